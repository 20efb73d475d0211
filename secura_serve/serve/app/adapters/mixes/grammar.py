"""How a request writes a weighted mix: ``iso-date+sentiment*0.5``, or a list of objects.

    mix    = part { "+" part }                    1 to MAX_PARTS parts, up to LONGEST characters
    part   = model [ "*" weight ]                 weight 1 where none is given
    model  = name [ "@" digest ]                  an adapter, one version of it, or an alias
    weight = [ "-" ] number                       0.5, .5, 2, 1e-3; up to ±MAX_WEIGHT

Blanks may stand around models, weights, ``*`` and ``+``. There is no subtraction, since a name may
hold a ``-``: write ``a+b*-0.5``. A weight has no ``+`` of its own: write ``1e3``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from secura_serve.adapter.store import NAME_PATTERN
from secura_serve.errors import MixError
from secura_serve.merge import MAX_WEIGHT

__all__ = [
    "LONGEST",
    "MAX_PARTS",
    "Part",
    "is_expression",
    "parse",
    "parts_of_field",
    "spell",
    "spell_weight",
    "weight_problem",
]

MAX_PARTS = 8
LONGEST = 1500
"""Characters; eight parts with the longest names, digests and weights fit in."""

_MODEL = re.compile(rf"{NAME_PATTERN}(?:@[0-9A-Za-z]{{1,64}})?")
_NUMBER = re.compile(r"-?(?:\d+\.?\d*|\.\d+)(?:[eE]-?\d+)?", re.ASCII)
_LONGEST_WEIGHT = 40
_SHOWN = 80
_HOW = "write a mix as NAME*WEIGHT+NAME*WEIGHT, such as a*0.5+b or a+b*-0.25"


@dataclass(frozen=True)
class Part:
    """One part of a mix, as it was asked for."""

    model: str
    """An adapter's name, ``name@digest`` or an alias."""
    weight: float


def is_expression(model: str | None) -> bool:
    """Return whether a model name can only mean a mix: no adapter and no alias is called so."""
    return model is not None and ("+" in model or "*" in model)


def parse(text: str) -> tuple[Part, ...]:
    """Return the parts of a mix, in the order in which they are written.

    Raises:
        MixError: (400) it is not written as the grammar says; the message says where and how.
    """
    if len(text) > LONGEST:
        raise MixError(400, f"a mix has up to {LONGEST} characters, this one {len(text)}")
    pieces = [piece.strip(" ") for piece in text.split("+")]
    _check_number(len(pieces))
    return tuple(_part(piece, text) for piece in pieces)


def _check_number(parts: int) -> None:
    if parts > MAX_PARTS:
        raise MixError(
            400,
            f"a mix has up to {MAX_PARTS} parts, not {parts}; merge some with secura-merge",
        )


def _part(piece: str, text: str) -> Part:
    model, star, number = (field.strip(" ") for field in piece.partition("*"))
    if not piece:
        raise MixError(
            400, f"the mix {_shown(text)} has an empty part (a weight has no '+'); {_HOW}"
        )
    if star and not _is_number(number) and _is_number(model) and _MODEL.fullmatch(number):
        raise MixError(
            400, f"the weight stands behind the name: write {number}*{model}, not {_shown(piece)}"
        )
    if not _MODEL.fullmatch(model):
        raise MixError(400, f"{_shown(model)} in a mix is no model's name; {_HOW}")
    if not star:
        return Part(model, 1.0)
    if not _is_number(number):
        plus = " (a weight has no '+': write 1e2)" if number[-1:] in ("e", "E") else ""
        raise MixError(400, f"{_shown(number)} in {_shown(piece)} is no weight{plus}; {_HOW}")
    weight = float(number)
    if (problem := weight_problem(weight)) is not None:
        raise MixError(400, f"{_shown(piece)}: {problem}")
    return Part(model, weight)


def _is_number(text: str) -> bool:
    return len(text) <= _LONGEST_WEIGHT and _NUMBER.fullmatch(text) is not None


def _shown(text: str) -> str:
    return repr(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…")


def weight_problem(weight: float) -> str | None:
    """Return why a number is no weight, or None."""
    # NaN compares false.
    if abs(weight) <= MAX_WEIGHT:
        return None
    return f"a weight is a number between -{MAX_WEIGHT:g} and {MAX_WEIGHT:g}, not {weight!r}"


def parts_of_field(value: Any) -> tuple[Part, ...]:
    """Return the parts that the field ``adapters`` of a body lists; null lists none.

    Args:
        value: ``[{"name": "a", "weight": 0.5}, …]`` as JSON gives it; the weight may be left out.

    Raises:
        MixError: (400) it is anything else.
    """
    if value is None:
        return ()
    if not isinstance(value, list):
        raise MixError(400, f"adapters must be a list, got {type(value).__name__}; {_FIELD}")
    _check_number(len(value))
    return tuple(_entry(entry, number) for number, entry in enumerate(value, 1))


_FIELD = 'write "adapters": [{"name": "a", "weight": 0.5}, {"name": "b"}]'


def _entry(entry: Any, number: int) -> Part:
    if not isinstance(entry, dict) or not {"name"} <= set(entry) <= {"name", "weight"}:
        raise MixError(
            400,
            f"adapters, entry {number}: it must be an object of name and weight; {_FIELD}",
        )
    name, weight = entry["name"], entry.get("weight", 1)
    if not isinstance(name, str) or not _MODEL.fullmatch(name):
        raise MixError(
            400, f"adapters, entry {number}: {_shown(str(name))} is no adapter's name; {_FIELD}"
        )
    if isinstance(weight, bool) or not isinstance(weight, (int, float)):
        raise MixError(400, f"adapters, entry {number}: the weight must be a number; {_FIELD}")
    # Compared before it is converted: a whole number of JSON may be larger than any float.
    if (problem := weight_problem(weight)) is not None:
        raise MixError(400, f"adapters, entry {number}: {problem[:_SHOWN]}")
    return Part(name, float(weight))


def spell_weight(weight: float) -> str:
    """Return the shortest decimal number that is read as this weight again."""
    return repr(weight).removesuffix(".0")


def spell(parts: Iterable[tuple[str, float]]) -> str:
    """Return models and weights as an expression, in this order; :func:`parse` reads it back."""
    return "+".join(
        model if weight == 1 else f"{model}*{spell_weight(weight)}" for model, weight in parts
    )
