"""The adapter step on any device: plain tensor operations, which torch.compile traces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from secura_serve.serve.kernels.activation import ACTIVATIONS
from secura_serve.serve.kernels.base import Kernel
from secura_serve.serve.kernels.torch_step import adapter_step

__all__ = ["TorchKernel", "TorchState"]


@dataclass(frozen=True)
class TorchState:
    """What the expression needs besides the bank."""

    rows: Tensor
    """``(n·r,)`` int64."""
    C: Tensor
    """``(n·r, out)``, block-diagonal."""
    offset: Tensor | None
    """``(n·r,)``."""


class TorchKernel(Kernel[TorchState]):
    """Used where no faster kernel is supported."""

    name, priority, fuses = "torch", 0, frozenset(ACTIVATIONS)

    @classmethod
    def is_supported(cls, device: torch.device, dtype: torch.dtype) -> bool:
        """Return True: torch runs everywhere."""
        return True

    def prepare(
        self, rows: Tensor, C: Tensor, offset: Tensor | None, starts: Sequence[int]
    ) -> TorchState:
        """Return C and the indices in the kernel's own layout; see :class:`Kernel`."""
        n, r = rows.shape
        blocks = C.new_zeros(n, r, C.shape[1])
        for s, (begin, end) in enumerate(zip(starts, starts[1:], strict=False)):
            blocks[s, :, begin:end] = C[:, begin:end]
        # An entry that no slice has meets zeros in U.
        clamped = rows.flatten().clamp(min=0).to(C.device)
        return TorchState(clamped, blocks.flatten(0, 1), offset)

    def step(
        self,
        y: Tensor,
        source: Tensor | None,
        slots: Tensor,
        bank: Tensor,
        ranks: Tensor,
        state: TorchState,
        active: Tensor,
    ) -> Tensor:
        """Return the adapted output as a new tensor; see :class:`Kernel`."""
        g = (y if source is None else source).index_select(1, state.rows)
        if state.offset is not None:
            g = g - state.offset
        return adapter_step(y, g, slots, bank=bank, C_t=state.C)
