"""A weighted sum of adapters as the server reads it: ``sentiment*0.5+iso-date``."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["LIMIT", "expression", "parts_of"]

LIMIT = 8
"""How many parts a mix may have."""


def expression(weight_by_name: Mapping[str, float]) -> str:
    """Return the model name of a mix; empty if it has no parts.

    A weight stands behind its name, without exponent or a plus of its own; 1 is left out.
    """
    parts = [
        name if weight == 1 else f"{name}*{weight:.4f}".rstrip("0").rstrip(".")
        for name, weight in weight_by_name.items()
    ]
    return "+".join(parts)


def parts_of(model: str, known: set[str]) -> dict[str, float]:
    """Return name -> weight of a mix; empty if the text is no mix of ``known`` adapters."""
    weights: dict[str, float] = {}
    for part in model.split("+"):
        name, star, weight = (piece.strip() for piece in part.partition("*"))
        try:
            value = float(weight) if star else 1.0
        except ValueError:
            return {}
        if name not in known:
            return {}
        weights[name] = weights.get(name, 0.0) + value
    return weights
