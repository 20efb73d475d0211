"""The resident updates of one linear, and the blocks that a GPU takes of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

__all__ = ["BLOCK", "PADDED", "DeltaSlots", "Form", "delta_blocks"]

PADDED = 32
"""The rows of :attr:`DeltaSlots.weight` are padded to a multiple of this."""
BLOCK = 32
"""Rows of one entry of :func:`delta_blocks`."""

Form = Literal["native", "triton", "torch"]
"""What takes the step: a C++ op on CPUs, a Triton kernel on GPUs, torch anywhere."""


@dataclass(frozen=True)
class DeltaSlots:
    """The updates of one linear, in tensors whose addresses never change."""

    weight: Tensor
    """``(K, rows, in)`` int8 or float32: the rows of all slices that any adapter may change."""
    scale: Tensor
    """``(K, rows)`` float32: D of a row is this times its ``weight``."""
    segments: Tensor
    """``(n, 3)`` int64 on the CPU: of each slice the first column in y, the first row, and how
    many."""
    blocks: Tensor
    """See :func:`delta_blocks`."""
    used: Tensor
    """``(K, n)`` uint8: whether an update changes a slice."""
    form: Form = "torch"


def delta_blocks(segments: Iterable[tuple[int, int, int]], device: torch.device) -> Tensor:
    """Return blocks of rows of one slice: ``(m, 4)`` int32 of column, row, count and slice."""
    table = [
        (column + at, first + at, min(BLOCK, count - at), s)
        for s, (column, first, count) in enumerate(segments)
        for at in range(0, count, BLOCK)
    ]
    return torch.tensor(table, dtype=torch.int32, device=device)
