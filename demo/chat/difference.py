"""How an answer differs from another, word by word."""

from __future__ import annotations

import re
from difflib import SequenceMatcher

__all__ = ["ADDED", "MISSING", "difference"]

ADDED, MISSING = "only here", "only in column 1"
_WORDS = re.compile(r"\S+\s*|\s+")


def difference(first: str, other: str) -> list[tuple[str, str | None]]:
    """Return the pieces of ``other``, and of ``first`` where it lacks them, with their label.

    The pieces are those of ``gr.HighlightedText``: what both have has no label.
    """
    left, right = _WORDS.findall(first), _WORDS.findall(other)
    pieces: list[tuple[str, str | None]] = []
    matcher = SequenceMatcher(None, [w.strip() for w in left], [w.strip() for w in right], False)
    for kind, a, b, c, d in matcher.get_opcodes():
        if kind == "equal":
            pieces.append(("".join(right[c:d]), None))
            continue
        if a < b:
            pieces.append(("".join(left[a:b]), MISSING))
        if c < d:
            pieces.append(("".join(right[c:d]), ADDED))
    return pieces
