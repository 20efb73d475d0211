"""Which adapters a visitor wants to see."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .card import kind

__all__ = ["ALL", "FILTERS", "matching"]

ALL = "all"
FILTERS = (ALL, "resident", "known", "pinned", "folded", "refused", "CUR", "LoRA", "fine-tune")


def matching(
    cards: Sequence[Mapping[str, Any]], text: str | None, wanted: str | None
) -> list[Mapping[str, Any]]:
    """Return the cards that hold every word of ``text`` in name, task, kind, aliases or digest."""
    words = (text or "").lower().split()
    return [
        card for card in cards if _wanted(card, wanted) and all(w in _said(card) for w in words)
    ]


def _said(card: Mapping[str, Any]) -> str:
    parts = [card["id"], card.get("task"), kind(card), card.get("digest"), card.get("state")]
    return " ".join(str(each) for each in [*parts, *(card.get("aliases") or [])]).lower()


def _wanted(card: Mapping[str, Any], wanted: str | None) -> bool:
    if wanted in (None, ALL):
        return True
    if wanted == "pinned":
        return bool(card.get("pinned"))
    return wanted == card.get("state") or kind(card).startswith(str(wanted))
