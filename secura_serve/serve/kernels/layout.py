"""How the U of one linear lie in a row of the bank."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Layout"]


@dataclass(frozen=True)
class Layout:
    """The shape of the U of one linear: ``(n, r, r)``, with n slices and a basis of r.

    Where ``pairs`` is given, it is ``(n, r/pairs, lanes, pairs)`` with the contracted index first.
    """

    n: int
    r: int
    """A multiple of ``pairs``."""
    pairs: int | None = None
    lanes: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one slot's part of the bank."""
        if self.pairs is None:
            return (self.n, self.r, self.r)
        return (self.n, self.r // self.pairs, self.lanes, self.pairs)

    @property
    def numel(self) -> int:
        """How many numbers that is."""
        return self.n * self.r * (self.lanes if self.pairs else self.r)

    def put(self, part: Tensor, s: int, U: Tensor) -> None:
        """Write U ``(out, in)`` of slice ``s`` into ``part``, which must be zero before."""
        rows, cols = U.shape
        if self.pairs is None:
            part[s, :rows, :cols] = U
            return
        if cols % self.pairs:
            U, cols = torch.nn.functional.pad(U, (0, 1)), cols + 1
        steps = cols // self.pairs
        part[s, :steps, :rows] = U.T.reshape(steps, self.pairs, rows).transpose(1, 2)
