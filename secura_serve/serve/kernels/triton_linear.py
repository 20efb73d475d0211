"""A base linear and its adapter step on a GPU, as the torch op ``secura_gpu::linear``.

Up to :data:`BESIDE` tokens, the first half of the step is made beside the linear
(:mod:`~secura_serve.serve.kernels.triton_beside`). That is why the linear is in the op: whoever
compiles the model could otherwise move it ahead of the step's beginning, or give the memory of its
input to somebody while the other stream still reads it. Imported on GPUs only (and, with
``TRITON_INTERPRET=1``, by the tests).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from secura_serve.serve.kernels import triton_step
from secura_serve.serve.kernels.triton_beside import begin, join

__all__ = ["BESIDE", "launch_linear"]

BESIDE = 512
"""The most tokens for which h is made beside the linear. Larger batches are mostly prompts, which
keep the GPU busy: they gather R·x from the linear's output rather than read rows of W again."""


def launch_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    R: Tensor | None,
    slots: Tensor,
    rows: Tensor,
    bank: Tensor,
    ranks: Tensor,
    C: Tensor,
    offset: Tensor | None,
    table: Tensor,
    active: Tensor,
    align: int,
    activation: str | None,
) -> Tensor:
    """Return y = W·x + b, ``(T, out)``, with C·(U_slot·R·x) added.

    With an activation return act(gate')·up' of that, ``(T, out/2)``.

    Args:
        x: ``(T, in)``.
        weight: ``(out, in)``.
        bias: ``(out,)``.
        R: ``(n·r, in)``, of which ``rows`` are the rows; None where they are those of ``weight``.

    The others are those of :func:`triton_step.launch` and :func:`triton_step.launch_activated`.
    """
    x = _contiguous(x)
    y, h = _linear(x, weight, bias, R, slots, rows, bank, ranks, active)
    source = None if h is not None else _gathered(x, R, active)
    held = (slots, rows, bank, ranks, C, offset)
    if activation is not None:
        return triton_step.launch_activated(y, source, *held, active, align, activation, h)
    if h is not None:
        triton_step.launch_expand(y, h, slots, C, table, align, joins=True)
    else:
        triton_step.launch(y, source, *held, table, active, align)
    return y


def _contiguous(x: Tensor) -> Tensor:
    """Return x with contiguous rows; a copy is held by the caller, for as long as it is read."""
    return x if x.stride(1) == 1 else x.contiguous()


def _linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    R: Tensor | None,
    slots: Tensor,
    rows: Tensor,
    bank: Tensor,
    ranks: Tensor,
    active: Tensor,
) -> tuple[Tensor, Tensor | None]:
    """Return y = W·x + b, and the h that was made beside it; None where none was."""
    if not 0 < x.shape[0] <= BESIDE or not active.item():
        return linear(x, weight, bias), None
    h = begin(x, weight if R is None else R, slots, rows, bank, ranks)
    try:
        y = linear(x, weight, bias)
    finally:
        # Also when it fails: whoever goes on must not be given memory that is still being read.
        join(x.device)
    return y, h


def _gathered(x: Tensor, R: Tensor | None, active: Tensor) -> Tensor | None:
    """Return what R·x is gathered from, where that is not y."""
    return torch.mm(x, R.T) if R is not None and active.item() else None


_LIBRARY = torch.library.Library("secura_gpu", "FRAGMENT")
_LIBRARY.define(
    "linear(Tensor x, Tensor weight, Tensor? bias, Tensor? R, Tensor slots, Tensor rows, "
    "Tensor bank, Tensor ranks, Tensor C, Tensor? offset, Tensor table, Tensor active, int align, "
    "str? activation) -> Tensor"
)
for _key in ("CUDA", "CPU"):
    _LIBRARY.impl("linear", launch_linear, _key)
torch.library.register_fake(
    "secura_gpu::linear",
    lambda x, weight, *held: x.new_empty(
        x.shape[0], weight.shape[0] if held[-1] is None else weight.shape[0] // 2
    ),
    lib=_LIBRARY,
)
