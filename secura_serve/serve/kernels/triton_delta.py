"""The step of resident updates on a GPU, as the torch op ``secura_gpu::delta_``.

One launch for a linear, whatever updates a batch asks for: a program has a block of rows of one
update and a block of tokens, and ends at once where none of these tokens wants that update. The
rows are widened from 8 bits on their way to the tensor cores; 8-bit integers are exact in bfloat16
and float16. The grid depends on shapes alone, and a batch without such tokens launches nothing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from secura_serve.serve.kernels.delta_slots import BLOCK

__all__ = ["ROWS", "launch_delta"]

ROWS = BLOCK
"""Rows of an update for one program."""
_FEW = 16


@triton.jit(do_not_specialize=["tokens"])
def delta(
    y, x, slots, places, weight, scale, blocks, used, tokens, across, stride, width, rows, n,
    inner: tl.constexpr, T: tl.constexpr, OUT: tl.constexpr, IN: tl.constexpr,
):  # fmt: skip
    """y[t, column + i] += scale[k, row + i]·Σ_j weight[k, row + i, j]·x[t, j] where t wants k."""
    t, k = tl.program_id(0) * T + tl.arange(0, T), tl.program_id(2)
    slot = tl.load(slots + t, mask=t < tokens, other=-1)
    place = tl.load(places + slot, mask=slot >= 0, other=-1)
    mine = place == k
    if tl.max(mine.to(tl.int32), axis=0) == 0:
        return
    block = blocks + tl.program_id(1) * 4
    column, row, count, s = (
        tl.load(block), tl.load(block + 1), tl.load(block + 2), tl.load(block + 3),
    )  # fmt: skip
    if tl.load(used + k * n + s) == 0:
        return
    i, j = tl.arange(0, OUT), tl.arange(0, IN)
    total = tl.zeros((T, OUT), dtype=tl.float32)
    source = weight + (k.to(tl.int64) * rows + row + i[:, None]) * inner + j[None, :]
    given = x + t[:, None].to(tl.int64) * stride + j[None, :]
    for first in range(0, inner, IN):
        # Rows of Q are zero beyond x's width, where x is not to be read.
        right = tl.load(source + first, mask=(i < count)[:, None] & (j < inner - first)[None, :])
        left = tl.load(
            given + first, mask=mine[:, None] & (j < width - first)[None, :], other=0
        )  # fmt: skip
        right = right.to(left.dtype)
        total = tl.dot(left, tl.trans(right), acc=total, input_precision="ieee")
    factor = tl.load(scale + k * rows + row + i, mask=i < count, other=0)
    inside = mine[:, None] & (i < count)[None, :]
    to = y + t[:, None].to(tl.int64) * across + column + i[None, :]
    before = tl.load(to, mask=inside, other=0).to(tl.float32)
    tl.store(to, (before + total * factor[None, :]).to(y.dtype.element_ty), mask=inside)


def launch_delta(
    y: Tensor,
    x: Tensor,
    slots: Tensor,
    places: Tensor,
    weight: Tensor,
    scale: Tensor,
    blocks: Tensor,
    used: Tensor,
    active: Tensor,
) -> None:
    """Take the step; see :func:`secura_serve.serve.kernels.delta_step.delta_step`.

    Args:
        blocks: ``(m, 4)`` int32: of each block of rows its first column in y, its first row, how
            many, and the slice.
        active: ``()`` bool on the CPU: whether any token wants an update.
    """
    tokens, (K, rows, inner) = y.shape[0], weight.shape
    if not tokens or not active.item():
        return
    half = y.dtype != torch.float32
    tile = 64 if half and tokens > _FEW else 16
    delta[(triton.cdiv(tokens, tile), blocks.shape[0], K)](
        y, x, slots, places, weight, scale, blocks, used, tokens, y.stride(0), x.stride(0),
        x.shape[1], rows, used.shape[1], inner,
        T=tile, OUT=ROWS, IN=128 if half else 32, num_warps=4, num_stages=3 if half else 2,
    )  # fmt: skip


_LIBRARY = torch.library.Library("secura_gpu", "FRAGMENT")
_LIBRARY.define(
    "delta_(Tensor(a!) y, Tensor x, Tensor slots, Tensor places, Tensor weight, Tensor scale, "
    "Tensor blocks, Tensor used, Tensor active) -> ()"
)
for _key in ("CUDA", "CPU"):
    _LIBRARY.impl("delta_", launch_delta, _key)
torch.library.register_fake("secura_gpu::delta_", lambda *args: None, lib=_LIBRARY)
