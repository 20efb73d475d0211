"""The bank: one tensor with the U of every linear, one row for each adapter slot.

Loading an adapter copies one row. A layer sees its part of all rows as a view, in the layout that
its kernel reads (:class:`~secura_serve.serve.kernels.layout.Layout`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from secura_serve.errors import UnservableError
from secura_serve.serve.kernels.layout import Layout

__all__ = ["Bank"]


class Bank:
    """``slots`` rows for adapters and a last row of zeros, for tokens without an adapter.

    It takes ``(slots + 1) · Σ n·r²`` numbers of memory, a little more where a layout is padded.

    Args:
        linears: for each linear, the names of its slices (None for a slice that no adapter
            changes) and their layout.
    """

    def __init__(
        self,
        slots: int,
        linears: Sequence[tuple[Sequence[str | None], Layout]],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._layouts = [layout for _, layout in linears]
        self._starts, total = [], 0
        for layout in self._layouts:
            self._starts.append(total)
            # Every part begins at a cache line.
            total += -(-layout.numel // 32) * 32
        self._where = {
            name: (i, s)
            for i, (names, _) in enumerate(linears)
            for s, name in enumerate(names)
            if name is not None
        }
        self.rows = torch.zeros(slots + 1, total, dtype=dtype, device=device)
        self.ranks = torch.zeros(slots + 1, dtype=torch.int32, device=device)
        """The highest index that a slot's adapter uses, plus one; 0 for an empty slot."""

    def part(self, i: int) -> Tensor:
        """Return the part of all rows that linear ``i`` uses: ``(slots + 1, *layout.shape)``."""
        layout, start = self._layouts[i], self._starts[i]
        view: Tensor = self.rows[:, start : start + layout.numel].unflatten(1, layout.shape)
        return view

    def pack(self, cores: Mapping[str, Tensor]) -> tuple[Tensor, int]:
        """Make a row, on the CPU, from the U of every module.

        Args:
            cores: U by module name, moved to the shared basis.

        Returns:
            The row and its rank, which is the highest index in use plus one.

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
        """Copy the row of an adapter, as :meth:`pack` made it, into a slot."""
        self.rows[slot].copy_(row, non_blocking=True)
        self.ranks[slot] = rank

    def clear(self, slot: int) -> None:
        """Set a slot to zero."""
        self.rows[slot].zero_()
        self.ranks[slot] = 0
