"""How far an adapter moves each linear, layer by layer, as a table of colours and numbers."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from html import escape

from ..adapters.words import number
from ..figure_table import figure_table
from .results import heat, heat_cell

__all__ = ["layer_table"]

_MODULE = re.compile(r"(?P<stack>.*?)\.?(?P<layer>\d+)\.(?P<kind>.+)")
# As a layer computes them; others follow as they come.
_ORDER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_STEPS = 5
_TOP = 0.95
"""The share of all linears that the scale covers; those beyond have its last colour."""


def layer_table(name: str, modules: Mapping[str, float]) -> str:
    """Return ‖W'−W‖/‖W‖ in percent: a row for each layer, a column for each kind of linear.

    Args:
        name: the adapter.
        modules: module name -> ratio, not empty.
    """
    cells: dict[tuple[str, str], dict[str, tuple[str, float]]] = {}
    for module, ratio in modules.items():
        found = _MODULE.fullmatch(module)
        row = (found["stack"], found["layer"]) if found else ("", "")
        cells.setdefault(row, {})[found["kind"] if found else module] = (module, ratio)
    kinds = _ordered(list(dict.fromkeys(kind for row in cells.values() for kind in row)))
    several = len({stack for stack, _ in cells}) > 1
    ratios = sorted(modules.values())
    # One that sticks out would leave all others pale.
    most = ratios[min(len(ratios) - 1, math.ceil(_TOP * (len(ratios) - 1)))]
    heads = "".join(
        f'<th scope=col title="{escape(kind)}">{escape(short)}</th>'
        for kind, short in [("layer", "layer"), *zip(kinds, _shortened(kinds), strict=True)]
    )
    rows = "".join(
        f"<tr><th scope=row>{escape(f'{stack}.{layer}' if several else layer)}</th>"
        f"{''.join(_cell(row.get(kind), most) for kind in kinds)}</tr>"
        for (stack, layer), row in cells.items()
    )
    said = f"{name}: change of each weight, ‖W′ − W‖ / ‖W‖, in %"
    caption = f"{escape(said)}{_scale(most)}"
    label = f"Change of every layer by {name}"
    return figure_table(label, heads, rows, caption=caption, kind="layers")


def _ordered(kinds: Sequence[str]) -> list[str]:
    place = {kind: i for i, kind in enumerate(_ORDER)}
    return sorted(kinds, key=lambda kind: place.get(kind.rpartition(".")[2], len(place)))


def _shortened(kinds: Sequence[str]) -> list[str]:
    """Return the last parts of the names, or all where two would be the same."""
    ends = [kind.rpartition(".")[2] for kind in kinds]
    return [
        kind if ends.count(end) > 1 else end.removesuffix("_proj") if end in _ORDER else end
        for kind, end in zip(kinds, ends, strict=True)
    ]


def _cell(what: tuple[str, float] | None, most: float) -> str:
    if what is None:
        return '<td title="not changed">–</td>'
    module, ratio = what
    title = f"{module}: {number(100 * ratio)} %"
    return heat_cell(ratio / most if most else 0.0, _percent(ratio, most), title)


def _percent(ratio: float, most: float) -> str:
    """Return a ratio with as many decimals as the largest needs to have two digits or three."""
    power = math.floor(math.log10(100 * most)) if most else 0
    return f"{100 * ratio:.{max(0, 2 - power) if power >= 0 else max(2, 1 - power)}f}"


def _scale(most: float) -> str:
    """Return the colours with their numbers, from 0 to the end of the scale."""
    shares = [step / (_STEPS - 1) for step in range(_STEPS)]
    marks = "".join(
        f'<span class="heat" style="{heat(share)}">{_percent(most * share, most)}</span>'
        for share in shares
    )
    return f'<span class="scale">{marks}<span>and more</span></span>'
