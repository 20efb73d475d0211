"""The launches that the GPU code makes, caught before they run: no GPU and no memory is needed.

What is compiled for other machines (``tests/support/triton_aot.py``) and what the roofline model
counts (``benchmarks/gpu_model.py``) are these, so that neither can drift from the code. Needs the
package ``triton``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from math import prod
from types import ModuleType
from typing import Any, NamedTuple

import torch
from triton.runtime.jit import JITFunction

from secura_serve.serve.kernels import triton_beside, triton_code, triton_step
from secura_serve.serve.kernels.triton_kernel import TritonKernel

__all__ = ["ACTIVATIONS", "LLAMA3_8B", "Launch", "caught", "fake", "step_launches"]

LLAMA3_8B = {
    "qkv": (4096, (4096, 1024, 1024)),
    "o": (4096, (4096,)),
    "gate_up": (4096, (14336, 14336)),
    "down": (14336, (4096,)),
}
"""Inputs and outputs of the packed linears of one of its 32 layers."""
ACTIVATIONS = {"gate_up": "silu"}
"""What follows them and takes their step along."""


class Launch(NamedTuple):
    """One launch of a kernel."""

    kernel: JITFunction
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    options: dict[str, Any]
    """Arguments by name and the compiler's options."""

    @property
    def programs(self) -> int:
        return prod(self.grid)

    @property
    def given(self) -> dict[str, Any]:
        """Every argument by its name."""
        return dict(zip(self.kernel.arg_names, self.args, strict=False)) | self.options


class _Catcher:
    def __init__(self, kernel: JITFunction, launches: list[Launch]) -> None:
        self._kernel, self._launches = kernel, launches

    def __getitem__(self, grid: Any) -> Any:
        def launch(*args: Any, **options: Any) -> None:
            self._launches.append(Launch(self._kernel, tuple(grid), args, options))

        return launch


@contextmanager
def caught(*modules: ModuleType) -> Iterator[list[Launch]]:
    """Yield a list that fills with the launches of the modules' kernels, none of which runs."""
    launches: list[Launch] = []
    kernels = [
        (module, name, value)
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, JITFunction)
    ]
    for module, name, kernel in kernels:
        setattr(module, name, _Catcher(kernel, launches))
    try:
        yield launches
    finally:
        for module, name, kernel in kernels:
            setattr(module, name, kernel)


def fake(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """A tensor without memory, for launches that are only caught."""
    return torch.empty(shape, dtype=dtype, device="meta")


def step_launches(
    outs: Sequence[int],
    r: int,
    tokens: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    biased: bool = False,
    active: bool = True,
    early: bool = True,
    adapters: int = 1,
    activation: str | None = None,
    width: int | None = None,
) -> list[Launch]:
    """The launches of the adapter step of one packed linear.

    Args:
        outs: the outputs of each of its slices.
        activation: what follows it and takes the step along.
        width: its inputs, where the step begins beside it; None where all is done after it.
        early: as on a GPU that can start a kernel before the one ahead has ended.
    """
    kernel, n = TritonKernel(), len(outs)
    starts = [0, *accumulate(outs)]
    layout = kernel.layout(n, r, dtype)
    C = torch.zeros(layout.r, starts[-1], dtype=dtype)
    offset = C.new_zeros(n * layout.r) if biased else None
    state = kernel.prepare(torch.zeros(n, layout.r, dtype=torch.int64), C, offset, starts)
    # A row of the bank is longer than one linear's part of it.
    bank = fake(adapters + 1, layout.numel + 32, dtype=dtype)
    part = bank[:, : layout.numel].unflatten(1, layout.shape)
    y, slots = fake(tokens, starts[-1], dtype=dtype), fake(tokens, dtype=torch.int64)
    ranks = fake(adapters + 1, dtype=torch.int32)
    known, triton_step.dependent_launch = triton_step.dependent_launch, lambda device: early
    try:
        with caught(triton_code, triton_beside) as launches:
            flag, h = torch.tensor(active), None
            if width is not None and active:
                x, W = fake(tokens, width, dtype=dtype), fake(starts[-1], width, dtype=dtype)
                h = triton_beside.begin(x, W, slots, state.rows, part, ranks)
            table, held = state.column_blocks, (slots, state.rows, part, ranks, state.C)
            if activation is not None:
                given = (*held, state.offset, flag, state.align, activation, h)
                triton_step.launch_activated(y, None, *given)
            elif h is not None:
                triton_step.launch_expand(y, h, slots, state.C, table, state.align, joins=True)
            else:
                triton_step.launch(y, None, *held, state.offset, table, flag, state.align)
    finally:
        triton_step.dependent_launch = known
    return launches
