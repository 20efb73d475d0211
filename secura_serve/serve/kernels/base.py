"""The three ways to run the adapter step, and the choice between them.

=========  ==================================  ==============================================
kernel     runs where                          reads
=========  ==================================  ==============================================
native     CPU, with a C++ compiler            U and C with pairs of the contracted index side
                                               by side, for the dot product of bfloat16
triton     GPU with Triton                     U as ``(r, r)``, C as ``(r, out)``
torch      everywhere                          the same, C block-diagonal
=========  ==================================  ==============================================

Each says how it wants U in the bank (:class:`Layout`) and prepares what all adapters share.
``SECURA_KERNEL`` names one of them, for tests and benchmarks.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from secura_serve.errors import ConfigError
from secura_serve.serve.engine.bank import Layout
from secura_serve.serve.kernels import native_step
from secura_serve.serve.kernels.torch_step import adapter_step

__all__ = ["Kernel", "choose"]

Shared = tuple[Any, ...]


class Kernel(ABC):
    """One way to compute y + C·(U_slot·(y − b)[rows])."""

    def layout(self, n: int, r: int, dtype: torch.dtype) -> Layout:
        """How the U of a linear with ``n`` slices and a basis of ``r`` lie in the bank."""
        return Layout(n, r)

    @abstractmethod
    def shared(
        self, rows: Tensor, C: Tensor, offset: Tensor | None, starts: Sequence[int]
    ) -> Shared:
        """What :meth:`step` needs besides the bank.

        Args:
            rows: ``(n, r)`` int64 on the CPU, columns of what is gathered from; −1 is none.
            C: ``(r, out)``, the slices' C side by side, transposed.
            offset: ``(n·r,)``, the bias at ``rows``.
            starts: where each slice's columns begin, and where the last ends.
        """

    @abstractmethod
    def step(
        self,
        y: Tensor,
        source: Tensor | None,
        slots: Tensor,
        bank: Tensor,
        ranks: Tensor,
        shared: Shared,
    ) -> Tensor:
        """The adapted output, in y's place or not.

        Args:
            y: ``(T, out)``.
            source: what is gathered from, where that is not ``y``.
            slots: ``(T,)`` int64; −1 is none.
            bank: ``(slots + 1, *layout)``.
            ranks: ``(slots + 1,)`` int32.
        """


class Native(Kernel):
    """:mod:`secura_serve.serve.kernels.native_step`."""

    def layout(self, n: int, r: int, dtype: torch.dtype) -> Layout:
        pairs, lanes = native_step.pairs(dtype), native_step.LANES
        return Layout(n, -(-r // pairs) * pairs, pairs, -(-r // lanes) * lanes)

    def shared(
        self, rows: Tensor, C: Tensor, offset: Tensor | None, starts: Sequence[int]
    ) -> Shared:
        paired = C.unflatten(0, (-1, native_step.pairs(C.dtype))).transpose(1, 2).contiguous()
        return rows.to(torch.int32), paired, offset, torch.tensor(starts)

    def step(
        self,
        y: Tensor,
        source: Tensor | None,
        slots: Tensor,
        bank: Tensor,
        ranks: Tensor,
        shared: Shared,
    ) -> Tensor:
        rows, C, offset, starts = shared
        torch.ops.secura.step_(y, source, slots, rows, bank, ranks, C, offset, starts)
        return y


class Triton(Kernel):
    """:mod:`secura_serve.serve.kernels.triton_step`."""

    def shared(
        self, rows: Tensor, C: Tensor, offset: Tensor | None, starts: Sequence[int]
    ) -> Shared:
        from secura_serve.serve.kernels import triton_step

        where = triton_step.blocks(list(starts), C.device)
        return rows.to(C.device, torch.int32), C, offset, where

    def step(
        self,
        y: Tensor,
        source: Tensor | None,
        slots: Tensor,
        bank: Tensor,
        ranks: Tensor,
        shared: Shared,
    ) -> Tensor:
        rows, C, offset, where = shared
        torch.ops.secura_gpu.step_(y, source, slots, rows, bank, ranks, C, offset, where)
        return y


class Torch(Kernel):
    """:mod:`secura_serve.serve.kernels.torch_step`."""

    def shared(
        self, rows: Tensor, C: Tensor, offset: Tensor | None, starts: Sequence[int]
    ) -> Shared:
        n, r = rows.shape
        blocks = C.new_zeros(n, r, C.shape[1])
        for s, (begin, end) in enumerate(zip(starts, starts[1:], strict=False)):
            blocks[s, :, begin:end] = C[:, begin:end]
        # An entry that no slice has meets zeros in U.
        return rows.flatten().clamp(min=0).to(C.device), blocks.flatten(0, 1), offset

    def step(
        self,
        y: Tensor,
        source: Tensor | None,
        slots: Tensor,
        bank: Tensor,
        ranks: Tensor,
        shared: Shared,
    ) -> Tensor:
        rows, C, offset = shared
        g = (y if source is None else source).index_select(1, rows)
        return adapter_step(y, g if offset is None else g - offset, slots, bank=bank, C_t=C)


def choose(device: torch.device, dtype: torch.dtype) -> Kernel:
    """The fastest kernel that runs on ``device``.

    Raises:
        ConfigError: ``SECURA_KERNEL`` names one that does not.
    """
    able: dict[str, Kernel] = {}
    if native_step.fits(device, dtype):
        able["native"] = Native()
    if device.type == "cuda" and _has_triton():
        able["triton"] = Triton()
    able["torch"] = Torch()
    wanted = os.environ.get("SECURA_KERNEL") or next(iter(able))
    if wanted not in able:
        raise ConfigError(f"SECURA_KERNEL={wanted}: not here; allowed: {', '.join(able)}")
    return able[wanted]


def _has_triton() -> bool:
    try:
        from secura_serve.serve.kernels import triton_step  # noqa: F401
    except ImportError:
        return False
    return True
