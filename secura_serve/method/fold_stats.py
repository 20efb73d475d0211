"""What a fold changed, as sums that add up over the blocks of a matrix."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["FoldStats", "measure_change"]


class FoldStats(NamedTuple):
    """Five sums; W' is what is written, W'₃₂ the same before rounding.

    A NaN or Inf in W or W' makes one of them NaN or Inf.
    """

    base: float
    """‖W‖²."""
    moved: float
    """‖W'−W‖²."""
    update: float
    """‖W'₃₂−W‖²."""
    lost: float
    """‖W'−W'₃₂‖²."""
    top: float
    """max |W'−W| / |W| over the weights that are not 0."""

    @classmethod
    def total(cls, blocks: Iterable[FoldStats]) -> FoldStats:
        """Return those of a matrix, from those of its blocks of rows."""
        base, moved, update, lost, top = zip(*blocks, strict=True)
        return cls(sum(base), sum(moved), sum(update), sum(lost), max(top))


def measure_change(W: Tensor, new: Tensor, written: Tensor) -> FoldStats:
    """Return the stats of one block; overwrites ``new``.

    Args:
        W, new: W and W'₃₂ in the computing dtype.
        written: W' in the output's dtype.
    """
    base = _square(W)
    if written.dtype == new.dtype:
        change, lost = new.sub_(W), 0.0
        update = moved = _square(change)
    else:
        change = written.to(new.dtype)
        update = _square(new - W)
        lost = _square(new.sub_(change))
        moved = _square(change.sub_(W))
    low, high = torch.aminmax(change.div_(W))
    top = max(-float(low), float(high))
    if not math.isfinite(top):  # 0/0 or x/0 where W is 0
        ratio = change[W != 0].abs()
        top = float(ratio.max()) if ratio.numel() else 0.0
    return FoldStats(base, moved, update, lost, top)


def _square(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values)) ** 2
