"""The row of a mix: Σ wᵢ·rowᵢ over the rows of adapters that a worker keeps.

All U of an adapter lie at their places in the server's shared basis, whatever its own rows and
columns are, and a row of the bank is linear in them. So the sum of rows is the row of the sum, and
a mix costs what one adapter costs, however many parts it has.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from secura_serve.adapter import LARGEST_RMS
from secura_serve.errors import UnservableError

__all__ = ["KeptRow", "check_mix", "mixed_row"]


@dataclass(frozen=True, eq=False)
class KeptRow:
    """What a worker keeps of one CUR adapter."""

    row: Tensor
    """As :meth:`Bank.pack` made it, in the engine's dtype."""
    used: int
    """The highest index in use, plus one."""
    rank: int
    sizes: Mapping[str, float]
    """Module -> bound of the update's root mean square."""


def mixed_row(parts: Sequence[tuple[KeptRow, float]]) -> Tensor:
    """Return Σ wᵢ·rowᵢ, summed in float32 in this order, rounded once to the rows' dtype."""
    total = torch.zeros(parts[0][0].row.shape, dtype=torch.float32)
    for kept, weight in parts:
        total.add_(kept.row, alpha=weight)
    return total.to(parts[0][0].row.dtype)


def check_mix(parts: Sequence[tuple[KeptRow, float]]) -> None:
    """Raise UnservableError if the update may be too large, for an adapter or for the dtype.

    The bound is Σ |wᵢ|·‖Uᵢ‖·‖C‖·‖R‖/√(out·in) per module, by the triangle inequality.
    """
    sizes: defaultdict[str, float] = defaultdict(float)
    for kept, weight in parts:
        for module, size in kept.sizes.items():
            sizes[module] += abs(weight) * size
    module = max(sizes, key=sizes.__getitem__)
    if sizes[module] > LARGEST_RMS:
        raise UnservableError(
            f"{module}: the entries of the summed update may reach {sizes[module]:.1e} in root "
            f"mean square; more than {LARGEST_RMS:g} would overflow in the engine. Use smaller "
            "weights"
        )
    row = mixed_row(parts)
    if not torch.isfinite(row).all():
        raise UnservableError(
            f"the summed U has numbers beyond what {str(row.dtype).removeprefix('torch.')}, the "
            "engine's dtype, can hold. Use smaller weights"
        )
