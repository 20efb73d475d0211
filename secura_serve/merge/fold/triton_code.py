"""The Triton kernels of a fold on a GPU; :mod:`secura_serve.merge.fold.triton_fold` launches them.

W has two strides, so that a transposed weight is the same problem. Products are exact to float32:
what is no number of W (U, L) is split into three of W's 16 bits, one after the other, and each part
is multiplied with W's own numbers, which is exact.

A weight can change in place, once C and R are gathered: then each program reads and writes its own
tile alone. What a 16-bit weight was before stays behind as a journal, the distance of W' from W
counted in numbers of their dtype (which is a difference of their bits, because a fold that keeps a
journal never changes a sign), in 4 or 8 bits. A later launch takes W back from W' and the journal.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["left", "fold"]


@triton.jit
def _times_wide(a, b, total, SPLIT: tl.constexpr):
    """total + a·b; a holds numbers of W, b float32."""
    if SPLIT:
        high = b.to(a.dtype)
        rest = b - high.to(tl.float32)
        middle = rest.to(a.dtype)
        low = (rest - middle.to(tl.float32)).to(a.dtype)
        total = tl.dot(a, low, acc=total)
        total = tl.dot(a, middle, acc=total)
        return tl.dot(a, high, acc=total)
    return tl.dot(a.to(tl.float32), b, acc=total, input_precision="ieee")


@triton.jit
def _wide_times(a, b, total, SPLIT: tl.constexpr):
    """total + a·b; a holds float32, b numbers of W."""
    if SPLIT:
        high = a.to(b.dtype)
        rest = a - high.to(tl.float32)
        middle = rest.to(b.dtype)
        low = (rest - middle.to(tl.float32)).to(b.dtype)
        total = tl.dot(low, b, acc=total)
        total = tl.dot(middle, b, acc=total)
        return tl.dot(high, b, acc=total)
    return tl.dot(a, b.to(tl.float32), acc=total, input_precision="ieee")


@triton.jit
def _read_journal(journal, m, j, inside, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
                  BITS: tl.constexpr):  # fmt: skip
    """Return the distances of a tile; of two columns in a byte, the even one has the low 4 bits."""
    if BITS == 8:
        place = journal + m[:, None].to(tl.int64) * width + j[None, :]
        return tl.load(place, mask=inside, other=0).to(tl.int16)
    row = (width + 1) // 2
    c = tl.program_id(0) * (COLUMNS // 2) + tl.arange(0, COLUMNS // 2)
    place = journal + m[:, None].to(tl.int64) * row + c[None, :]
    rows = tl.max(inside.to(tl.int32), axis=1) > 0
    pair = tl.load(place, mask=rows[:, None] & (c < row)[None, :], other=0).to(tl.int16)
    low, high = ((pair & 15) ^ 8) - 8, ((pair >> 4 & 15) ^ 8) - 8
    return tl.reshape(tl.join(low, high), (ROWS, COLUMNS))


@triton.jit
def _write_journal(journal, distance, m, j, inside, width, ROWS: tl.constexpr,
                   COLUMNS: tl.constexpr, BITS: tl.constexpr):  # fmt: skip
    """Keep the distances of a tile, each cut to BITS bits."""
    if BITS == 8:
        place = journal + m[:, None].to(tl.int64) * width + j[None, :]
        tl.store(place, distance.to(tl.int8), mask=inside)
    else:
        row = (width + 1) // 2
        c = tl.program_id(0) * (COLUMNS // 2) + tl.arange(0, COLUMNS // 2)
        low, high = tl.split(tl.reshape(distance, (ROWS, COLUMNS // 2, 2)))
        place = journal + m[:, None].to(tl.int64) * row + c[None, :]
        rows = tl.max(inside.to(tl.int32), axis=1) > 0
        pair = ((high & 15) << 4 | (low & 15)).to(tl.uint8)
        tl.store(place, pair, mask=rows[:, None] & (c < row)[None, :])


@triton.jit
def left(
    L, W, cols, U, weight, out, down, across,
    first: tl.constexpr, r: tl.constexpr, wide: tl.constexpr, ROWS: tl.constexpr,
    OUT: tl.constexpr, IN: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """L[m, first + i] = weight·Σ_k W[m, cols[k]]·U[k, i]: a block of rows and of i.

    Without ``cols`` W is C.
    """
    m = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    i = tl.program_id(1) * OUT + tl.arange(0, OUT)
    total = tl.zeros((ROWS, OUT), dtype=tl.float32)
    for begin in range(0, r, IN):
        k = begin + tl.arange(0, IN)
        at = k if cols is None else tl.load(cols + k, mask=k < r, other=0)
        C = tl.load(
            W + m[:, None].to(tl.int64) * down + at[None, :].to(tl.int64) * across,
            mask=(m < out)[:, None] & (k < r)[None, :], other=0,
        )  # fmt: skip
        core = tl.load(
            U + k[:, None] * r + i[None, :], mask=(k < r)[:, None] & (i < r)[None, :], other=0
        )
        total = _times_wide(C, core, total, SPLIT)
    place = L + m[:, None].to(tl.int64) * wide + first + i[None, :]
    tl.store(place, total * weight, mask=(m < out)[:, None] & (i < r)[None, :])


@triton.jit
def fold(
    new, bad, W, L, R, rows, old_journal, new_journal, out, width, down, across, r_down, r_across,
    new_down, new_across, a, b, peak,
    k_all: tl.constexpr, FORM: tl.constexpr, TINY: tl.constexpr, OLD: tl.constexpr,
    NEW: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, K: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """new = S-MagNorm(W, L·R[rows]), rounded once; bad is set where a number is not finite.

    Without ``rows`` R lies there as it is, with ``k_all`` 0 new = W. ``old_journal`` makes W of
    what lies there first; where ``new_journal`` cannot hold a distance, ``bad[1]`` is set.
    """
    m = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    j = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (m < out)[:, None] & (j < width)[None, :]
    delta = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    if k_all > 0:
        for begin in range(0, k_all, K):
            k = begin + tl.arange(0, K)
            at = (k if rows is None else tl.load(rows + k, mask=k < k_all, other=0)).to(tl.int64)
            some = (k < k_all)[:, None] & (j < width)[None, :]
            right = tl.load(R + at[:, None] * r_down + j[None, :] * r_across, mask=some, other=0)
            here = (m < out)[:, None] & (k < k_all)[None, :]
            part = tl.load(L + m[:, None].to(tl.int64) * k_all + k[None, :], mask=here, other=0)
            delta = _wide_times(part, right, delta, SPLIT)
    place = W + m[:, None].to(tl.int64) * down + j[None, :] * across
    held = tl.load(place, mask=inside, other=0)
    if old_journal is not None:
        moved = _read_journal(old_journal, m, j, inside, width, ROWS, COLUMNS, OLD)
        held = (held.to(tl.int16, bitcast=True) - moved).to(held.dtype, bitcast=True)
    w = held.to(tl.float32)
    if k_all == 0:
        made = w
    elif FORM == 0:
        made = w + delta
    elif FORM == 1:
        # published: a is the scale, b is ε.
        rho = tl.abs(delta) / (tl.abs(w) + b)
        res = 2 - tl.sigmoid(a * (rho / tl.where(peak > 0, peak, 1.0) - 0.5))
        made = tl.where(peak > 0, (2 * w + delta) / res, w + delta)
    else:
        # bounded: a is τ.
        reach = a * tl.abs(w)
        live = reach >= TINY
        ratio = tl.where(live, delta, 0.0) / tl.where(live, reach, 1.0)
        made = tl.where(live, w + reach * (2 * tl.sigmoid(2 * ratio) - 1), w)
    rounded = made.to(new.dtype.element_ty)
    large = tl.abs(rounded.to(tl.float32))
    wrong = inside & ((large != large) | (large == float("inf")))
    tl.store(bad, 1, mask=tl.max(tl.max(wrong.to(tl.int32), axis=1), axis=0) > 0)
    # In place: nobody writes to this tile before all have read it.
    tl.debug_barrier()
    if new_journal is not None:
        distance = rounded.to(tl.int16, bitcast=True) - held.to(tl.int16, bitcast=True)
        most: tl.constexpr = 2 ** (NEW - 1)
        short = inside & ((distance < -most) | (distance >= most))
        tl.store(bad + 1, 1, mask=tl.max(tl.max(short.to(tl.int32), axis=1), axis=0) > 0)
        _write_journal(new_journal, distance, m, j, inside, width, ROWS, COLUMNS, NEW)
    place = new + m[:, None].to(tl.int64) * new_down + j[None, :] * new_across
    tl.store(place, rounded, mask=inside)
