"""All U of all slots in one tensor: loading an adapter is one copy of one row.

A layer sees its part of every row as a view. How a part is laid out is the layer's choice: plain
``(n, r, r)``, or as the native step reads it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from secura_serve.errors import UnservableError

__all__ = ["Bank", "Layout"]


@dataclass(frozen=True)
class Layout:
    """How the U of one linear lie in a row: ``(n, r, r)``, or ``(n, r/pairs, lanes, pairs)`` with
    the contracted index first where ``pairs`` is given."""

    n: int
    r: int
    """Even where pairs is 2."""
    pairs: int | None = None
    lanes: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        if self.pairs is None:
            return (self.n, self.r, self.r)
        return (self.n, self.r // self.pairs, self.lanes, self.pairs)

    @property
    def numel(self) -> int:
        return self.n * self.r * (self.lanes if self.pairs else self.r)

    def put(self, part: Tensor, s: int, U: Tensor) -> None:
        """Write U ``(out, in)`` of slice ``s`` into the ``part`` of a row that is zero so far."""
        rows, cols = U.shape
        if self.pairs is None:
            part[s, :rows, :cols] = U
            return
        if cols % self.pairs:
            U, cols = torch.nn.functional.pad(U, (0, 1)), cols + 1
        steps = cols // self.pairs
        part[s, :steps, :rows] = U.T.reshape(steps, self.pairs, rows).transpose(1, 2)


class Bank:
    """``slots`` rows and one that stays zero, for tokens without an adapter.

    Args:
        places: per linear, the names of its slices (None where no adapter touches one) and their
            layout.

    Memory: ``(slots + 1) · Σ n·r²`` numbers, a little more where lanes are padded.
    """

    def __init__(
        self,
        slots: int,
        places: Sequence[tuple[Sequence[str | None], Layout]],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._layouts = [layout for _, layout in places]
        self._starts, total = [], 0
        for layout in self._layouts:
            self._starts.append(total)
            # Every part begins at a cache line.
            total += -(-layout.numel // 32) * 32
        self._where = {
            name: (i, s)
            for i, (names, _) in enumerate(places)
            for s, name in enumerate(names)
            if name is not None
        }
        self.rows = torch.zeros(slots + 1, total, dtype=dtype, device=device)
        self.ranks = torch.zeros(slots + 1, dtype=torch.int32, device=device)
        """The highest index that a slot's adapter uses, plus one; 0 for an empty slot."""

    def part(self, i: int) -> Tensor:
        """What linear ``i`` sees: ``(slots + 1, *layout.shape)``, a view."""
        layout, start = self._layouts[i], self._starts[i]
        view: Tensor = self.rows[:, start : start + layout.numel].unflatten(1, layout.shape)
        return view

    def pack(self, cores: Mapping[str, Tensor]) -> tuple[Tensor, int]:
        """A row on the CPU made of U per module, embedded in the basis; and its rank.

        Raises:
            UnservableError: a module that no linear of this engine has.
        """
        row, rank = torch.zeros(self.rows.shape[1], dtype=self.rows.dtype), 0
        for name, U in cores.items():
            if name not in self._where:
                raise UnservableError(f"{name}: this engine has no such linear with a basis")
            i, s = self._where[name]
            layout, start = self._layouts[i], self._starts[i]
            layout.put(row[start : start + layout.numel].view(layout.shape), s, U)
            rank = max(rank, *U.shape)
        return row, rank

    def put(self, slot: int, row: Tensor, rank: int) -> None:
        """Load an adapter into a slot."""
        self.rows[slot].copy_(row, non_blocking=True)
        self.ranks[slot] = rank

    def clear(self, slot: int) -> None:
        """Empty a slot."""
        self.rows[slot].zero_()
        self.ranks[slot] = 0
