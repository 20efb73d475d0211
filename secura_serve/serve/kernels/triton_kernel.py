"""The adapter step on a GPU: the Triton op of :mod:`~secura_serve.serve.kernels.triton_step`.

Triton is imported only where this kernel is used, since the package may be absent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor

from secura_serve.serve.kernels.activation import ACTIVATIONS
from secura_serve.serve.kernels.base import Kernel
from secura_serve.serve.kernels.layout import Layout

__all__ = ["TritonAfterKernel", "TritonKernel", "TritonState"]


@dataclass(frozen=True)
class TritonState:
    """What the op needs besides the bank."""

    rows: Tensor
    """``(n, r)`` int32."""
    C: Tensor
    """``(r, out)``."""
    offset: Tensor | None
    """``(n·r,)``."""
    column_blocks: Tensor
    """``(m, 3)`` int32: first column, end and slice of each block of columns."""
    align: int
    """Divides where slices begin and end."""


class TritonKernel(Kernel[TritonState]):
    """For CUDA devices, where the package ``triton`` is installed."""

    name, priority, skips, fuses = "triton", 20, True, frozenset(ACTIVATIONS)
    takes_linear = True

    @classmethod
    def is_supported(cls, device: torch.device, dtype: torch.dtype) -> bool:
        """Return whether this is a GPU and Triton can be imported."""
        return device.type == "cuda" and find_spec("triton") is not None

    def layout(self, n: int, r: int, dtype: torch.dtype) -> Layout:
        """Return a layout whose rows can be read 16 bytes at a time."""
        return Layout(n, -(-r // 8) * 8)

    def prepare(
        self, rows: Tensor, C: Tensor, offset: Tensor | None, starts: Sequence[int]
    ) -> TritonState:
        """Return C and the indices in the kernel's own layout; see :class:`Kernel`."""
        from secura_serve.serve.kernels import triton_beside, triton_linear, triton_step  # noqa: F401

        if C.is_cuda:
            triton_beside.prepare_stream(C.device)
        edges = list(starts)
        column_blocks = triton_step.blocks(edges, C.device)
        rows = rows.to(C.device, torch.int32)
        return TritonState(rows, C, offset, column_blocks, triton_step.alignment(edges))

    def step(
        self,
        y: Tensor,
        source: Tensor | None,
        slots: Tensor,
        bank: Tensor,
        ranks: Tensor,
        state: TritonState,
        active: Tensor,
    ) -> Tensor:
        """Change ``y`` in place and return it; see :class:`Kernel`."""
        torch.ops.secura_gpu.step_(
            y,
            source,
            slots,
            state.rows,
            bank,
            ranks,
            state.C,
            state.offset,
            state.column_blocks,
            active,
            state.align,
        )
        return y

    def activated_step(
        self,
        y: Tensor,
        source: Tensor | None,
        slots: Tensor,
        bank: Tensor,
        ranks: Tensor,
        state: TritonState,
        active: Tensor,
        activation: str,
    ) -> Tensor:
        """Leave ``y`` as it is and return the activation's output; see :class:`Kernel`."""
        made: Tensor = torch.ops.secura_gpu.activated(
            y,
            source,
            slots,
            state.rows,
            bank,
            ranks,
            state.C,
            state.offset,
            active,
            state.align,
            activation,
        )
        return made

    def linear(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        R: Tensor | None,
        slots: Tensor,
        bank: Tensor,
        ranks: Tensor,
        state: TritonState,
        active: Tensor,
        activation: str | None = None,
    ) -> Tensor:
        """Return the linear's adapted output; see :class:`Kernel`."""
        made: Tensor = torch.ops.secura_gpu.linear(
            *(x, weight, bias, R, slots, state.rows, bank, ranks, state.C, state.offset),
            *(state.column_blocks, active, state.align, activation),
        )
        return made


class TritonAfterKernel(TritonKernel):
    """The same with the whole step after the linear; chosen by name alone."""

    name, priority, takes_linear = "triton-after", 10, False
