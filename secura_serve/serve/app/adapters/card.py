"""What an adapter's own files say of it: task, scores, and what it keeps of the base.

Read for people, from ``README.md`` and ``train.json``; nothing that is served depends on it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

__all__ = ["read_card"]

_LARGEST = 2**20
_LONGEST = 400
# How the scores of an evaluation are called that compare with the base instead of with answers.
_RETENTION = ("kl", "perplexity", "unchanged", "still_right", "kept", "retention")


def read_card(folder: Path) -> dict[str, Any]:
    """Return ``task`` (text), ``scores`` and ``retention`` (name -> number); each may be empty."""
    facts = _json(folder / "train.json")
    numbers = {}
    if isinstance(facts.get("scores"), dict):
        numbers = {
            key[:100]: float(value)
            for key, value in facts["scores"].items()
            if key.isprintable() and _is_number(value)
        }
    kept = {k: v for k, v in numbers.items() if k.lower().startswith(_RETENTION)}
    scores = {k: v for k, v in numbers.items() if k not in kept}
    return {"task": _first_sentence(folder / "README.md"), "scores": scores, "retention": kept}


def _is_number(value: object) -> bool:
    # NaN fails the comparison, and an integer may be too large for a float.
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and abs(value) <= sys.float_info.max  # type: ignore[arg-type]


def _json(file: Path) -> dict[str, Any]:
    try:
        raw = json.loads(_text(file))
    except (ValueError, RecursionError):
        return {}
    return raw if isinstance(raw, dict) else {}


def _first_sentence(file: Path) -> str:
    """Return the first paragraph below the first heading, on one line."""
    lines = _text(file).splitlines()
    heading = next((i for i, line in enumerate(lines) if line.startswith("# ")), None)
    paragraph: list[str] = []
    for line in lines[heading + 1 :] if heading is not None else ():
        if line.strip():
            paragraph.append(line.strip())
        elif paragraph:
            break
    text = " ".join(paragraph).encode(errors="replace").decode()
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


def _text(file: Path) -> str:
    try:
        if not file.is_file() or file.stat().st_size > _LARGEST:
            return ""
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ""
