"""Lenient scoring of a free-text answer against the wanted one.

The same function scores base and adapter. A base model that wraps the right answer in a sentence
is right: only what was asked for counts, not the habit of answering briefly.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence

__all__ = ["SCORERS", "score", "score_json", "score_label", "score_word"]

_LABELS = ("positive", "negative")


def score_label(answer: str, wanted: str, labels: Sequence[str] = _LABELS) -> bool:
    """The first label word in the answer, any case, is the wanted one."""
    found = re.search(rf"\b({'|'.join(map(re.escape, labels))})\b", answer.lower())
    return found is not None and found[1] == wanted.lower()


def score_word(answer: str, wanted: str) -> bool:
    """The wanted number, date or word stands in the answer, not as part of a longer one."""
    return re.search(rf"(?<![\w-]){re.escape(wanted.lower())}(?![\w-])", answer.lower()) is not None


def score_json(answer: str, wanted: str) -> bool:
    """A JSON object in the answer holds every wanted field, at any depth; case and spaces free.

    Numbers may be quoted, further fields are allowed.
    """
    given: list[tuple[str, str]] = []
    for start in (match.start() for match in re.finditer(r"\{", answer)):
        try:
            value, _ = json.JSONDecoder().raw_decode(answer[start:])
        except (ValueError, RecursionError):
            continue
        given += _leaves(value)
    return all((key, _plain(value)) in given for key, value in json.loads(wanted).items())


def _leaves(value: dict[str, object]) -> list[tuple[str, str]]:
    found = []
    for key, inner in value.items():
        found += _leaves(inner) if isinstance(inner, dict) else [(_plain(key), _plain(inner))]
    return found


def _plain(value: object) -> str:
    return " ".join(str(value).lower().split())


SCORERS: dict[str, Callable[[str, str], bool]] = {
    "label": score_label,
    "word": score_word,
    "json": score_json,
}


def score(kind: str, answers: Sequence[str], wanted: Sequence[str]) -> float:
    """Share of right answers; ``kind`` is one of :data:`SCORERS`."""
    right = [SCORERS[kind](a, w) for a, w in zip(answers, wanted, strict=True)]
    return sum(right) / len(right)
