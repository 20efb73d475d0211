"""The field ``adapters`` of a JSON body: a mix for clients whose model name is fixed.

    {"model": "smollm2-135m", "adapters": [{"name": "a", "weight": 0.5}, {"name": "b"}], …}

vLLM does not know the field. It is taken out, and what it lists becomes the ``model``.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from secura_serve.errors import MixError
from secura_serve.serve.app.adapters.mixes.grammar import parts_of_field, spell

__all__ = ["FIELD", "take_adapters"]

FIELD = "adapters"
_SHOWN = 80


def take_adapters(asked: dict[str, Any], bases: Collection[str]) -> None:
    """Put what a body's field lists in the place of its model; an empty list leaves the model.

    Args:
        asked: the body, which is changed.
        bases: what the base is called.

    Raises:
        MixError: (400) the field is malformed, or the model is an adapter already.
    """
    value = asked.pop(FIELD)
    parts = parts_of_field(value)
    model = asked.get("model")
    if value is not None and model and model not in bases:
        raise MixError(
            400,
            f"adapters are added to the base, and model is {str(model)[:_SHOWN]!r}: name the base "
            f"({next(iter(bases), 'none')}) or no model, or name all adapters in one place",
        )
    if parts:
        mix = spell((part.model, part.weight) for part in parts)
        # The base is no part of a mix, which is told of an expression and not of a name.
        asked["model"] = f"{mix}*1" if mix in bases else mix
