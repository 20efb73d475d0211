"""Lenient scoring of a free-text answer against the wanted one.

The same function scores base and adapter. A base model that wraps the right answer in a sentence
is right: only what was asked for counts, not the habit of answering briefly.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Sequence

__all__ = ["SCORERS", "score_json", "score_label", "score_name", "score_number", "score_word"]

_LABELS = ("positive", "negative")


def score_label(answer: str, wanted: str, labels: Sequence[str] = _LABELS) -> bool:
    """Say whether the first label word in the answer, in any case, is the wanted one."""
    label = re.search(rf"\b({'|'.join(map(re.escape, labels))})\b", answer.lower())
    return label is not None and label[1] == wanted.lower()


def score_word(answer: str, wanted: str) -> bool:
    """Say whether the wanted number, date or word is in the answer, not as part of another."""
    return re.search(rf"(?<![\w-]){re.escape(wanted.lower())}(?![\w-])", answer.lower()) is not None


def score_name(answer: str, wanted: str) -> bool:
    """Score as :func:`score_word`, accents and apostrophes left aside: Lome is Lomé."""
    return score_word(_bare(answer), _bare(wanted))


def score_number(answer: str, wanted: str) -> bool:
    """Say whether the last number of both is the same; the steps before it are free."""
    given, right = _last_number(answer), _last_number(wanted)
    return given is not None and given == right


def _bare(text: str) -> str:
    parts = unicodedata.normalize("NFKD", text)
    return "".join(c for c in parts if not unicodedata.combining(c) and c not in "'’ʻ`")


def _last_number(text: str) -> float | None:
    numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
    return float(numbers[-1].replace(",", "")) if numbers else None


def score_json(answer: str, wanted: str) -> bool:
    """Say whether JSON in the answer holds every wanted field, at any depth, in any case.

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
    leaves = []
    for key, inner in value.items():
        leaves += _leaves(inner) if isinstance(inner, dict) else [(_plain(key), _plain(inner))]
    return leaves


def _plain(value: object) -> str:
    return " ".join(str(value).lower().split())


SCORERS: dict[str, Callable[[str, str], bool]] = {
    "label": score_label,
    "word": score_word,
    "name": score_name,
    "number": score_number,
    "json": score_json,
}
