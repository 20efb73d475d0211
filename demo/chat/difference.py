"""How an answer differs from another, word by word."""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import SequenceMatcher
from os.path import commonprefix

__all__ = ["ADDED", "MISSING", "difference"]

ADDED, MISSING = "only here", "only in column 1"
_WORDS = re.compile(r"\S+\s*|\s+")


def difference(first: str, other: str) -> list[tuple[str, str | None]]:
    """Return the pieces of ``other``, and of ``first`` where it lacks them, with their label.

    The pieces are those of ``gr.HighlightedText``: what both have has no label. Takes at most a
    third of a second for answers of 4096 words, whatever they are.
    """
    left, right = _WORDS.findall(first), _WORDS.findall(other)
    pieces: list[tuple[str, str | None]] = []
    for same, a, b, c, d in _spans([w.strip() for w in left], [w.strip() for w in right]):
        if same:
            pieces.append(("".join(right[c:d]), None))
            continue
        if a < b:
            pieces.append(("".join(left[a:b]), MISSING))
        if c < d:
            pieces.append(("".join(right[c:d]), ADDED))
    return pieces


def _spans(left: list[str], right: list[str]) -> list[tuple[bool, int, int, int, int]]:
    """Return for each part whether ``left[a:b]`` is ``right[c:d]``, and a, b, c, d."""
    start = len(commonprefix([left, right]))
    end = len(commonprefix([left[start:][::-1], right[start:][::-1]]))
    a, b = left[start : len(left) - end], right[start : len(right) - end]
    spans = [(True, 0, start, 0, start)] if start else []
    spans += [
        (same, start + i, start + j, start + k, start + m) for same, i, j, k, m in _inner(a, b)
    ]
    if end:
        spans.append((True, len(left) - end, len(left), len(right) - end, len(right)))
    return spans


def _inner(left: Sequence[str], right: Sequence[str]) -> list[tuple[bool, int, int, int, int]]:
    # difflib is cubic where few words repeat often, as small models do. It then takes frequent
    # words for no place to meet, but only those of a second sequence of 200 words or more.
    if len(left) > len(right):
        return [(same, i, j, k, m) for same, k, m, i, j in _inner(right, left)]
    matcher = SequenceMatcher(None, left, right)
    return [(kind == "equal", *where) for kind, *where in matcher.get_opcodes()]
