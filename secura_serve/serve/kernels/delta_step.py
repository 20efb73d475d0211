"""The step of resident updates: y += D_i·x for the tokens whose adapter i has one.

D = W' − W of a linear, whole, so the step reads ``x`` where the adapter step reads ``y``. Tokens
are grouped by update: each that a batch asks for is read once, whatever number of tokens wants it.
A batch that asks for none costs one look at the slots, or on a GPU at a flag.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

from secura_serve.serve.kernels.delta_slots import DeltaSlots, Form
from secura_serve.serve.kernels.native_library import DTYPES, native_library

__all__ = ["choose_delta_step", "delta_step"]

_SOURCE = "native_delta.cpp"


def choose_delta_step(device: torch.device, dtype: torch.dtype) -> Form:
    """Return what takes the step for y and x of this kind."""
    if device.type == "cuda" and find_spec("triton") is not None:
        from secura_serve.serve.kernels import triton_delta  # noqa: F401  (registers its op)

        return "triton"
    if device.type == "cpu" and dtype in DTYPES and native_library(_SOURCE) is not None:
        return "native"
    return "torch"


def delta_step(
    y: Tensor, x: Tensor, slots: Tensor, places: Tensor, held: DeltaSlots, active: Tensor
) -> None:
    """Add D_i·x to ``y``, in place; torch.compile traces it as one call.

    Args:
        y: ``(T, out)``.
        x: ``(T, in)``, in y's dtype.
        slots: ``(T,)`` int64, each token's adapter slot; −1 for none.
        places: ``(slots + 1,)`` int32: the place in ``held`` of the update of an adapter slot; −1
            where it has none, which the last entry always is.
        active: ``()`` bool on the CPU: False where no token of the batch wants an update.
    """
    common = (y, x, slots, places, held.weight, held.scale)
    if held.form == "triton":
        torch.ops.secura_gpu.delta_(*common, held.blocks, held.used, active)
    elif held.form == "native":
        torch.ops.secura.delta_(*common, held.segments, held.used)
    else:
        torch.ops.secura_delta.step_(*common, held.segments, held.used)


@torch.library.custom_op("secura_delta::step_", mutates_args=("y",))
def torch_step_(
    y: Tensor,
    x: Tensor,
    slots: Tensor,
    places: Tensor,
    weight: Tensor,
    scale: Tensor,
    segments: Tensor,
    used: Tensor,
) -> None:
    """Take the step in torch: a GEMM for each update in the batch; see :func:`delta_step`."""
    at = places[slots]
    for k in at.unique().tolist():
        if k < 0:
            continue
        where = (at == k).nonzero().squeeze(-1)
        # In float32: half-precision sums would lose more than 8 bits do.
        rows = x[where].float()
        for s, (column, first, count) in enumerate(segments.tolist()):
            if used[k, s]:
                part = slice(first, first + count)
                h = rows @ weight[k, part, : x.shape[1]].float().T * scale[k, part]
                y[where, column : column + count] += h.to(y.dtype)
