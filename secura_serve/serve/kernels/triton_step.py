"""The adapter step on a GPU in two Triton kernels, as the torch op ``secura_gpu::step_``.

The first makes h = U_slot·g of every token and slice, g gathered from the base linear's own
output; the second adds C·h to that output, a block of tokens and columns at a time. A token without
an adapter costs a comparison, a narrow adapter its own rank. Grids depend on shapes alone, so that
CUDA graphs and torch.compile take the op as it is. Imported on GPUs only (and, with
``TRITON_INTERPRET=1``, by the tests).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["COLUMNS", "blocks"]

COLUMNS = 128
"""Columns of y that one program of the second kernel adds to."""
_TOKENS = 16


@triton.jit
def _core(
    h, source, slots, rows, bank, ranks, offset,
    stride, apart, n, r, BIASED: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """h[t, s] = U[slot, s]·(source[t, rows[s]] − offset[s]): one program per token and slice."""
    t, s = tl.program_id(0), tl.program_id(1)
    slot = tl.load(slots + t)
    if slot < 0:
        return
    # An adapter may be wider on other linears.
    rank = tl.minimum(tl.load(ranks + slot), r)
    k = tl.arange(0, R)
    at = tl.load(rows + s * r + k, mask=k < rank, other=-1)
    g = tl.load(source + t.to(tl.int64) * stride + at, mask=at >= 0, other=0).to(tl.float32)
    if BIASED:
        g -= tl.load(offset + s * r + k, mask=at >= 0, other=0).to(tl.float32)
    inside = (k[:, None] < rank) & (k[None, :] < rank)
    place = slot.to(tl.int64) * apart + s * r * r + k[:, None] * r + k[None, :]
    U = tl.load(bank + place, mask=inside, other=0).to(tl.float32)
    made = tl.sum(U * g[None, :], axis=1)
    tl.store(h + (t * n + s) * r + k, made.to(h.dtype.element_ty), mask=k < r)


@triton.jit
def _expand(
    y, h, slots, C, where, tokens, across, out, n, r,
    T: tl.constexpr, COLS: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """y[t, j] += Σ_k h[t, s(j), k]·C[k, j]: one program per block of tokens and columns."""
    t = tl.program_id(0) * T + tl.arange(0, T)
    slot = tl.load(slots + t, mask=t < tokens, other=-1)
    if tl.max(slot, axis=0) < 0:
        return
    block = tl.program_id(1) * 3
    first, last, s = tl.load(where + block), tl.load(where + block + 1), tl.load(where + block + 2)
    j, k = first + tl.arange(0, COLS), tl.arange(0, R)
    mine, held = slot >= 0, k < r
    left = tl.load(
        h + (t[:, None] * n + s) * r + k[None, :], mask=mine[:, None] & held[None, :], other=0
    )
    right = tl.load(
        C + k[:, None] * out + j[None, :], mask=held[:, None] & (j < last)[None, :], other=0
    )
    place = y + t[:, None].to(tl.int64) * across + j[None, :]
    inside = mine[:, None] & (j < last)[None, :]
    total = tl.load(place, mask=inside, other=0).to(tl.float32)
    total = tl.dot(left, right, acc=total, input_precision="ieee")
    tl.store(place, total.to(y.dtype.element_ty), mask=inside)


def blocks(starts: list[int], device: torch.device) -> Tensor:
    """Return blocks of columns of one slice: ``(m, 3)`` int32 of first, end and slice.

    Args:
        starts: where each slice's columns begin, and where the last ends.
    """
    table = [
        (first, end, s)
        for s, (begin, end) in enumerate(zip(starts, starts[1:], strict=False))
        for first in range(begin, end, COLUMNS)
    ]
    return torch.tensor(table, dtype=torch.int32, device=device)


@torch.library.custom_op("secura_gpu::step_", mutates_args=("y",))
def step_(
    y: Tensor,
    source: Tensor | None,
    slots: Tensor,
    rows: Tensor,
    bank: Tensor,
    ranks: Tensor,
    C: Tensor,
    offset: Tensor | None,
    where: Tensor,
) -> None:
    """y += C·(U_slot·(source − offset)[rows]) in place.

    Args:
        y: ``(T, out)``.
        source: what is gathered from, ``(T, any)``; None is ``y`` itself.
        slots: ``(T,)`` int64; −1 is none.
        rows: ``(n, r)`` int32, columns of ``source``; −1 where a slice has fewer.
        bank: ``(slots + 1, n, r, r)``, each slot contiguous.
        ranks: ``(slots + 1,)`` int32.
        C: ``(r, out)``, the slices' C side by side, transposed.
        offset: ``(n·r,)``, the bias at ``rows``.
        where: see :func:`blocks`.
    """
    tokens, (n, r) = y.shape[0], rows.shape
    if not tokens:
        return
    h = torch.empty(tokens, n, r, dtype=y.dtype, device=y.device)
    given = y if source is None else source
    R = max(16, triton.next_power_of_2(r))
    _core[(tokens, n)](
        h, given, slots, rows, bank, ranks, offset, given.stride(0), bank.stride(0), n, r,
        BIASED=offset is not None, R=R, num_warps=4 if R >= 64 else 1,
    )  # fmt: skip
    _expand[(triton.cdiv(tokens, _TOKENS), where.shape[0])](
        y, h, slots, C, where, tokens, y.stride(0), C.shape[1], n, r,
        T=_TOKENS, COLS=COLUMNS, R=R,
    )  # fmt: skip
