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
_EXAMPLES, _LONGEST_EXAMPLE = 5, 2000
# Settings of a run that say where files were, or nothing about the adapter.
_NO_RECIPE = ("data", "eval_data", "out", "overwrite", "device")
# How the scores of an evaluation are called that compare with the base instead of with answers.
_RETENTION = ("kl", "perplexity", "unchanged", "still_right", "kept", "retention")


def read_card(folder: Path) -> dict[str, Any]:
    """Return what is told of an adapter; each may be empty.

    ``task`` (text), ``examples`` (prompts: the quotations of ``README.md``), ``scores`` and
    ``retention`` (name -> number), ``recipe`` (setting -> value: how it was trained).
    """
    facts = _json(folder / "train.json")
    numbers = _numbers(facts.get("scores")) | _evaluated(facts)
    kept = {k: v for k, v in numbers.items() if k.lower().startswith(_RETENTION)}
    scores = {k: v for k, v in numbers.items() if k not in kept}
    lines = _text(folder / "README.md").splitlines()
    return {
        "task": _first_paragraph(lines),
        "examples": _quotations(lines),
        "scores": scores,
        "retention": kept,
        "recipe": _recipe(facts.get("config")),
    }


def _numbers(raw: object) -> dict[str, float]:
    return {
        key[:100]: float(value)
        for key, value in (raw.items() if isinstance(raw, dict) else ())
        if key.isprintable() and _is_number(value)
    }


def _evaluated(facts: dict[str, Any]) -> dict[str, float]:
    """Return what the evaluation of the run's own seed found, and its accuracy on the base."""
    try:
        evaluation = facts["evaluation"]
        own = evaluation["seeds"][str(facts["config"]["seed"])]
        accuracies = {"accuracy": own["accuracy"], "base_accuracy": evaluation["base"]["accuracy"]}
        kept = _numbers(own["retention"])
    except (KeyError, TypeError):
        return {}
    return _numbers(accuracies) | {k: v for k, v in kept.items() if k.startswith(_RETENTION)}


def _recipe(config: object) -> dict[str, Any]:
    return {
        key: value
        for key, value in (config.items() if isinstance(config, dict) else ())
        if key not in _NO_RECIPE
        and key.isprintable()
        and len(key) <= 100
        and (isinstance(value, bool) or _is_number(value) or _is_short(value))
    }


def _is_short(value: object) -> bool:
    return isinstance(value, str) and value.isprintable() and len(value) <= 100


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


def _first_paragraph(lines: list[str]) -> str:
    """Return the first paragraph below the first heading, on one line."""
    heading = next((i for i, line in enumerate(lines) if line.startswith("# ")), None)
    paragraph: list[str] = []
    for line in lines[heading + 1 :] if heading is not None else ():
        if line.strip():
            paragraph.append(line.strip())
        elif paragraph:
            break
    text = _encodable(" ".join(paragraph))
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


def _quotations(lines: list[str]) -> list[str]:
    """Return the block quotes, without their marks; one that is too long to be typed is left."""
    found: list[list[str]] = [[]]
    for line in lines:
        if line.startswith(">"):
            found[-1].append(line[1:].removeprefix(" ").rstrip())
        elif found[-1]:
            found.append([])
    texts = [_encodable("\n".join(quote)).strip() for quote in found]
    return [text for text in texts if 0 < len(text) <= _LONGEST_EXAMPLE][:_EXAMPLES]


def _encodable(text: str) -> str:
    return text.encode(errors="replace").decode()


def _text(file: Path) -> str:
    try:
        if not file.is_file() or file.stat().st_size > _LARGEST:
            return ""
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ""
