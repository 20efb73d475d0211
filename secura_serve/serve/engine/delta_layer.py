"""The resident updates of vLLM's linear LoRA layers: D of whole adapters, in slots of their own.

A layer has none until :meth:`DeltaLinearMixin.install_deltas`. Each rank holds the rows or columns
of D that it holds of W. Memory of a layer: ``K·rows·in`` numbers, ``rows`` being those of the
slices (q, k and v; gate and up) that any adapter may change.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from vllm.lora.layers import (
    ColumnParallelLinearWithLoRA,
    MergedColumnParallelLinearWithLoRA,
    QKVParallelLinearWithLoRA,
    RowParallelLinearWithLoRA,
)

from secura_serve.errors import UnservableError
from secura_serve.serve.kernels import (
    PADDED,
    DeltaSlots,
    choose_delta_step,
    delta_blocks,
    delta_step,
)

__all__ = ["DeltaLinearMixin"]


class DeltaLinearMixin:
    """y' = y + D_k·x for the tokens whose adapter has its update in place k."""

    deltas: DeltaSlots | None = None
    places: Tensor
    """``(slots + 1,)`` int32, given by the manager: of each adapter slot the place of its update,
    −1 for none."""

    wants_delta: Tensor
    """``()`` bool on the CPU, given by the manager: whether any token of a batch wants one."""

    # Given by the vLLM class that this is mixed into.
    base_layer: Any
    device: torch.device
    lora_config: Any
    input_size: int
    n_slices: int
    output_slices: tuple[int, ...]
    tp_size: int
    tp_rank: int

    @property
    def sharded_out(self) -> bool:
        """Whether each rank holds some of the outputs."""
        return self.tp_size > 1 and isinstance(self, ColumnParallelLinearWithLoRA)

    @property
    def sharded_in(self) -> bool:
        """Whether each rank holds some of the inputs."""
        return self.tp_size > 1 and isinstance(self, RowParallelLinearWithLoRA)

    def refuse_fused_shards(self) -> None:
        """Raise UnservableError where q, k and v are one module that is split over ranks."""
        if self.sharded_out and isinstance(self, QKVParallelLinearWithLoRA):
            raise UnservableError("a checkpoint with fused qkv needs --tensor-parallel-size 1")

    def shard_of(self, s: int) -> int:
        """Return which part of slice ``s`` this rank holds, in units of its own size."""
        if isinstance(self, MergedColumnParallelLinearWithLoRA):
            return int(self.output_ids[s])
        return self.tp_rank

    def install_deltas(self, slices: Sequence[str | None], count: int, dtype: torch.dtype) -> None:
        """Make room for updates.

        Args:
            slices: the module of each slice that adapters may change; None for the others.
            count: how many updates.
            dtype: int8 or float32.
        """
        if not any(slices):
            return
        if len(slices) != self.n_slices:
            raise UnservableError(f"{len(slices)} modules for a linear of {self.n_slices} slices")
        self.refuse_fused_shards()
        inner = self.base_layer.input_size_per_partition if self.sharded_in else self.input_size
        starts = [0, *accumulate(self.output_slices)]
        segments, rows = list[tuple[int, int, int]](), 0
        self._delta_slices: dict[str, tuple[int, int]] = {}
        for s, module in enumerate(slices):
            if module is not None:
                self._delta_slices[module] = (s, len(segments))
                segments.append((starts[s], rows, self.output_slices[s]))
                rows += self.output_slices[s]
        self._inner = inner
        self.deltas = DeltaSlots(
            torch.zeros(count, rows, -(-inner // PADDED) * PADDED, dtype=dtype, device=self.device),
            torch.zeros(count, rows, device=self.device),
            torch.tensor(segments, dtype=torch.int64),
            delta_blocks(segments, self.device),
            torch.zeros(count, len(segments), dtype=torch.uint8, device=self.device),
            choose_delta_step(self.device, self.lora_config.lora_dtype),
        )

    def clear_delta(self, place: int) -> None:
        """Have the update in a place change no slice, until :meth:`put_delta`."""
        if self.deltas is not None:
            self.deltas.used[place].zero_()

    def put_delta(self, place: int, module: str, weight: Tensor, scale: Tensor) -> None:
        """Copy this rank's part of one module's update into a place.

        Args:
            weight: ``(out, in)`` of the whole module, on the CPU.
            scale: ``(out,)``.

        Raises:
            UnservableError: it is not of the linear's shape.
        """
        assert self.deltas is not None
        s, segment = self._delta_slices[module]
        _, first, count = self.deltas.segments[segment].tolist()
        if self.sharded_out:
            rows = slice(self.shard_of(s) * count, (self.shard_of(s) + 1) * count)
            weight, scale = weight[rows], scale[rows]
        if self.sharded_in:
            weight = weight[:, self.tp_rank * self._inner : (self.tp_rank + 1) * self._inner]
        if weight.shape != (count, self._inner):
            raise UnservableError(
                f"{module}: an update of {tuple(weight.shape)} for a linear of "
                f"{(count, self._inner)}"
            )
        part = slice(first, first + count)
        self.deltas.weight[place, part, : self._inner].copy_(weight, non_blocking=True)
        self.deltas.scale[place, part].copy_(scale, non_blocking=True)
        self.deltas.used[place, segment] = 1

    def apply_deltas(self, y: Tensor, x: Tensor, slots: Tensor) -> None:
        """Add to ``y`` ``(T, out)`` what the tokens' updates make of ``x`` ``(T, in)``."""
        if self.deltas is not None:
            delta_step(y, x, slots, self.places, self.deltas, self.wants_delta)
