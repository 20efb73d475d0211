"""The adapter step's Triton kernels; :mod:`~secura_serve.serve.kernels.triton_step` launches them.

``r`` is a multiple of 8 and a constant, and so are the edges of tiles, so that the compiler sees
that U, C and y can be read 16 bytes at a time. A slot is zero beyond its adapter's rank: reading on
to the next multiple of 8 changes nothing.

Where ``PDL`` is set, a kernel starts while the one before it ends (NVIDIA's programmatic dependent
launch): before ``gdc_wait`` it may only read what was written long before, so neither y nor h. U,
ranks and slots are: their copies are in the stream ahead of the batch's first kernel, which starts
when they have ended. The first kernel lets the second start after its own wait, when y is complete.
Programs that have nothing to do wait, too: a kernel that ends early would end the wait of the next.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["core", "core_grouped", "expand", "expand_activated"]


@triton.jit(do_not_specialize=["stride"])
def core(
    h, source, slots, rows, bank, ranks, offset, stride, apart,
    n: tl.constexpr, r: tl.constexpr, BIASED: tl.constexpr,
    OUT: tl.constexpr, IN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """h[t, s] = U[slot, s]·(source[t, rows[s]] − offset[s]): OUT entries for each program."""
    parts: tl.constexpr = (r + OUT - 1) // OUT
    t, s = tl.program_id(0), tl.program_id(1) // parts
    slot = tl.load(slots + t)
    if slot < 0:
        if PDL:
            tl.extra.cuda.gdc_wait()
        return
    # An adapter may be wider on other linears.
    rank = tl.minimum((tl.load(ranks + slot) + 7) // 8, r // 8) * 8
    i = tl.program_id(1) % parts * OUT + tl.arange(0, OUT)
    given, U_of = source + t.to(tl.int64) * stride, bank + slot.to(tl.int64) * apart + s * r * r
    if r <= IN:
        # All but g was written before the linear's own kernel began.
        k = tl.arange(0, IN)
        at = tl.load(rows + s * r + k, mask=k < rank, other=-1)
        inside = (i[:, None] < rank) & (k[None, :] < rank)
        U = tl.load(U_of + i[:, None] * r + k[None, :], mask=inside, other=0)
        if BIASED:
            b = tl.load(offset + s * r + k, mask=at >= 0, other=0).to(tl.float32)
        if PDL:
            tl.extra.cuda.gdc_wait()
            tl.extra.cuda.gdc_launch_dependents()
        g = tl.load(given + at, mask=at >= 0, other=0).to(tl.float32)
        if BIASED:
            g -= b
        total = tl.sum(U.to(tl.float32) * g[None, :], axis=1)
    else:
        total = tl.zeros((OUT,), dtype=tl.float32)
        if PDL:
            tl.extra.cuda.gdc_wait()
            tl.extra.cuda.gdc_launch_dependents()
        for first in range(0, r, IN):
            k = first + tl.arange(0, IN)
            at = tl.load(rows + s * r + k, mask=k < rank, other=-1)
            g = tl.load(given + at, mask=at >= 0, other=0).to(tl.float32)
            if BIASED:
                g -= tl.load(offset + s * r + k, mask=at >= 0, other=0).to(tl.float32)
            inside = (i[:, None] < rank) & (k[None, :] < rank)
            U = tl.load(U_of + i[:, None] * r + k[None, :], mask=inside, other=0).to(tl.float32)
            total += tl.sum(U * g[None, :], axis=1)
    tl.store(h + (t * n + s) * r + i, total.to(h.dtype.element_ty), mask=i < r)


@triton.jit(do_not_specialize=["tokens", "stride"])
def core_grouped(
    h, source, slots, rows, bank, ranks, offset, tokens, stride, apart,
    n: tl.constexpr, r: tl.constexpr, BIASED: tl.constexpr,
    T: tl.constexpr, OUT: tl.constexpr, IN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Compute h like :func:`core`, but for T tokens at once: one product for each adapter in them.

    The tokens of a prompt are neighbours, so that U is read once for most tiles.
    """
    parts: tl.constexpr = (r + OUT - 1) // OUT
    t, s = tl.program_id(0) * T + tl.arange(0, T), tl.program_id(1) // parts
    left = tl.load(slots + t, mask=t < tokens, other=-1)
    i = tl.program_id(1) % parts * OUT + tl.arange(0, OUT)
    mine = left >= 0
    slot = tl.max(left, axis=0)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if slot < 0:
        return
    total = tl.zeros((T, OUT), dtype=tl.float32)
    while slot >= 0:
        now = left == slot
        rank = tl.minimum((tl.load(ranks + slot) + 7) // 8, r // 8) * 8
        for first in range(0, r, IN):
            k = first + tl.arange(0, IN)
            at = tl.load(rows + s * r + k, mask=k < rank, other=-1)
            some = now[:, None] & (at >= 0)[None, :]
            place = t[:, None].to(tl.int64) * stride + at[None, :]
            g = tl.load(source + place, mask=some, other=0)
            if BIASED:
                b = tl.load(offset + s * r + k, mask=at >= 0, other=0)
                g = tl.where(some, g.to(tl.float32) - b[None, :].to(tl.float32), 0)
                g = g.to(h.dtype.element_ty)
            U = tl.load(
                bank + slot.to(tl.int64) * apart + s * r * r + i[:, None] * r + k[None, :],
                mask=(i[:, None] < rank) & (k[None, :] < rank), other=0,
            )  # fmt: skip
            total = tl.dot(g, tl.trans(U), acc=total, input_precision="ieee")
        left = tl.where(now, -1, left)
        slot = tl.max(left, axis=0)
    place = h + (t[:, None].to(tl.int64) * n + s) * r + i[None, :]
    tl.store(place, total.to(h.dtype.element_ty), mask=mine[:, None] & (i < r)[None, :])


@triton.jit(do_not_specialize=["tokens"])
def expand(
    y, h, slots, C, blocks, tokens, across, out,
    n: tl.constexpr, r: tl.constexpr, T: tl.constexpr, COLUMNS: tl.constexpr, K: tl.constexpr,
    ALIGN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y[t, j] += Σ_k h[t, s(j), k]·C[k, j]: one program per block of tokens and columns."""
    t = tl.program_id(0) * T + tl.arange(0, T)
    slot = tl.load(slots + t, mask=t < tokens, other=-1)
    if tl.max(slot, axis=0) < 0:
        if PDL:
            tl.extra.cuda.gdc_wait()
        return
    block = tl.program_id(1) * 3
    first = tl.load(blocks + block) // ALIGN * ALIGN
    last = tl.load(blocks + block + 1) // ALIGN * ALIGN
    s = tl.load(blocks + block + 2)
    j, k, mine = first + tl.arange(0, COLUMNS), tl.arange(0, K), slot >= 0
    inside = mine[:, None] & (j < last)[None, :]
    place = y + t[:, None].to(tl.int64) * across + j[None, :]
    given = h + (t[:, None].to(tl.int64) * n + s) * r + k[None, :]
    source = C + k[:, None] * out + j[None, :]
    if r <= K:
        right = tl.load(source, mask=(k < r)[:, None] & (j < last)[None, :], other=0)
        if PDL:
            tl.extra.cuda.gdc_wait()
        total = tl.load(place, mask=inside, other=0).to(tl.float32)
        left = tl.load(given, mask=mine[:, None] & (k < r)[None, :], other=0)
        total = tl.dot(left, right, acc=total, input_precision="ieee")
    else:
        if PDL:
            tl.extra.cuda.gdc_wait()
        total = tl.load(place, mask=inside, other=0).to(tl.float32)
        for begin in range(0, r, K):
            here = k < r - begin
            right = tl.load(
                source + begin * out, mask=here[:, None] & (j < last)[None, :], other=0
            )  # fmt: skip
            left = tl.load(given + begin, mask=mine[:, None] & here[None, :], other=0)
            total = tl.dot(left, right, acc=total, input_precision="ieee")
    tl.store(place, total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _mixed(
    source, slot, t, rows, bank, ranks, offset, stride, apart, s: tl.constexpr,
    r: tl.constexpr, BIASED: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """h of slice s of several tokens, each with a U of its own: ``(len(t), K)``."""
    k, mine = tl.arange(0, K), slot >= 0
    rank = tl.minimum((tl.load(ranks + slot, mask=mine, other=0) + 7) // 8, r // 8) * 8
    at = tl.load(rows + s * r + k, mask=k < r, other=-1)
    some = (k[None, :] < rank[:, None]) & (at >= 0)[None, :]
    place = slot.to(tl.int64)[:, None, None] * apart + s * r * r
    inside = (k[None, :, None] < rank[:, None, None]) & (k[None, None, :] < rank[:, None, None])
    U = tl.load(bank + place + k[None, :, None] * r + k[None, None, :], mask=inside, other=0)
    g = tl.load(source + t[:, None].to(tl.int64) * stride + at[None, :], mask=some, other=0)
    g = g.to(tl.float32)
    if BIASED:
        b = tl.load(offset + s * r + k, mask=at >= 0, other=0).to(tl.float32)
        g = tl.where(some, g - b[None, :], 0)
    return tl.sum(U.to(tl.float32) * g[:, None, :], axis=2)


@triton.jit(do_not_specialize=["tokens", "stride"])
def expand_activated(
    made, y, h, slots, C, source, rows, bank, ranks, offset, tokens, across, width, stride, apart,
    r: tl.constexpr, BIASED: tl.constexpr, T: tl.constexpr, COLUMNS: tl.constexpr,
    K: tl.constexpr, ALIGN: tl.constexpr, TANH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """made[t, j] = act(gate)·up, y + C·h of column j being gate, and of j + width/2 being up.

    In float32 up to the result, whether or not a token has an adapter. Without ``h``, for ranks up
    to K, each program works out its tokens' own, and there is no first kernel.
    """
    t = tl.program_id(0) * T + tl.arange(0, T)
    slot = tl.load(slots + t, mask=t < tokens, other=-1)
    half = width // 2 // ALIGN * ALIGN
    j, k, mine = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, K), slot >= 0
    # Where no token has an adapter C is not read.
    edge = half * (tl.max(slot, axis=0) >= 0).to(tl.int32)
    inside = (t < tokens)[:, None] & (j < half)[None, :]
    place = y + t[:, None].to(tl.int64) * across + j[None, :]
    right_of = C + k[:, None] * width + j[None, :]
    wanted = (j < edge)[None, :]
    if r <= K:
        right = tl.load(right_of, mask=(k < r)[:, None] & wanted, other=0)
        other = tl.load(right_of + half, mask=(k < r)[:, None] & wanted, other=0)
        if PDL:
            tl.extra.cuda.gdc_wait()
        gate = tl.load(place, mask=inside, other=0).to(tl.float32)
        up = tl.load(place + half, mask=inside, other=0).to(tl.float32)
        if h is None:
            left = _mixed(
                source, slot, t, rows, bank, ranks, offset, stride, apart, 0, r, BIASED, K
            )  # fmt: skip
            gate = tl.dot(left.to(right.dtype), right, acc=gate, input_precision="ieee")
            left = _mixed(
                source, slot, t, rows, bank, ranks, offset, stride, apart, 1, r, BIASED, K
            )  # fmt: skip
            up = tl.dot(left.to(right.dtype), other, acc=up, input_precision="ieee")
        else:
            given = h + t[:, None].to(tl.int64) * (2 * r) + k[None, :]
            held = mine[:, None] & (k < r)[None, :]
            left = tl.load(given, mask=held, other=0)
            gate = tl.dot(left, right, acc=gate, input_precision="ieee")
            left = tl.load(given + r, mask=held, other=0)
            up = tl.dot(left, other, acc=up, input_precision="ieee")
    else:
        given = h + t[:, None].to(tl.int64) * (2 * r) + k[None, :]
        if PDL:
            tl.extra.cuda.gdc_wait()
        gate = tl.load(place, mask=inside, other=0).to(tl.float32)
        up = tl.load(place + half, mask=inside, other=0).to(tl.float32)
        for begin in range(0, r, K):
            here = k < r - begin
            right = tl.load(right_of + begin * width, mask=here[:, None] & wanted, other=0)
            left = tl.load(given + begin, mask=mine[:, None] & here[None, :], other=0)
            gate = tl.dot(left, right, acc=gate, input_precision="ieee")
            right = tl.load(right_of + begin * width + half, mask=here[:, None] & wanted, other=0)
            left = tl.load(given + r + begin, mask=mine[:, None] & here[None, :], other=0)
            up = tl.dot(left, right, acc=up, input_precision="ieee")
    inner = gate
    if TANH:
        inner = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
    total = gate * tl.sigmoid(inner) * up
    to = made + t[:, None].to(tl.int64) * half + j[None, :]
    tl.store(to, total.to(made.dtype.element_ty), mask=inside)
