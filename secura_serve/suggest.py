"""The nearest known name to one that is unknown: ``; did you mean 'bounded'?``."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["did_you_mean", "near_names"]


def near_names(name: str, names: Iterable[str], most: int = 3) -> list[str]:
    """Return those of ``names`` that ``name`` may have meant, best first; case does not count."""
    lower = {known.lower(): known for known in names}
    close = difflib.get_close_matches(name[:200].lower(), lower, n=most, cutoff=0.6)
    return [lower[match] for match in close]


def did_you_mean(name: object, names: Iterable[str]) -> str:
    """Return ``; did you mean 'x'?``, to put behind an error message, or nothing if none is near.

    Args:
        name: what was asked for; anything but a string is near to nothing.
    """
    near = near_names(name, names, most=2) if isinstance(name, str) else []
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
