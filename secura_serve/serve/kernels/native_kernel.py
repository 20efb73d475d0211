"""The adapter step on a CPU: the C++ op of :mod:`~secura_serve.serve.kernels.native_step`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from secura_serve.serve.kernels import native_step
from secura_serve.serve.kernels.base import Kernel
from secura_serve.serve.kernels.layout import Layout

__all__ = ["NativeKernel", "NativeState"]


@dataclass(frozen=True)
class NativeState:
    """What the op needs besides the bank."""

    rows: Tensor
    """``(n, r)`` int32."""
    C: Tensor
    """``(r/pairs, out, pairs)``."""
    offset: Tensor | None
    """``(n·r,)``."""
    starts: Tensor
    """``(n + 1,)`` int64."""


class NativeKernel(Kernel[NativeState]):
    """Compiled at first use, for CPUs."""

    name, priority = "native", 20

    @classmethod
    def is_supported(cls, device: torch.device, dtype: torch.dtype) -> bool:
        """Return whether the op could be compiled and takes such tensors."""
        return native_step.is_supported(device, dtype)

    def layout(self, n: int, r: int, dtype: torch.dtype) -> Layout:
        """Return a layout with pairs of the contracted index side by side."""
        pairs, lanes = native_step.pairs(dtype), native_step.LANES
        return Layout(n, -(-r // pairs) * pairs, pairs, -(-r // lanes) * lanes)

    def prepare(
        self, rows: Tensor, C: Tensor, offset: Tensor | None, starts: Sequence[int]
    ) -> NativeState:
        """Return C and the indices in the kernel's own layout; see :class:`Kernel`."""
        paired = C.unflatten(0, (-1, native_step.pairs(C.dtype))).transpose(1, 2).contiguous()
        return NativeState(rows.to(torch.int32), paired, offset, torch.tensor(starts))

    def step(
        self,
        y: Tensor,
        source: Tensor | None,
        slots: Tensor,
        bank: Tensor,
        ranks: Tensor,
        state: NativeState,
        active: Tensor,
    ) -> Tensor:
        """Change ``y`` in place and return it; see :class:`Kernel`."""
        torch.ops.secura.step_(
            y, source, slots, state.rows, bank, ranks, state.C, state.offset, state.starts
        )
        return y
