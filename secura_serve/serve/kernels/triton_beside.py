"""The first half of the adapter step on a GPU, beside the base linear.

h = U_slot·(W[rows]·x) needs only the linear's input. So it is made on a stream of its own while the
linear runs: its two launches cost memory traffic, and time only where they end after the linear.
What is left to do then is one launch, C·h. The rows are read from W where it lies, which the linear
reads at the same time: no copy of them is kept, and a fold changes both.

Imported on GPUs only (and, with ``TRITON_INTERPRET=1``, by the tests).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["begin", "join", "prepare_stream"]

# The most programs that share a sum, each with a multiple of so many inputs, and how many programs
# are wanted: about an H100's multiprocessors, so that none has a long chain of loads.
_PARTS, _INPUTS, _PROGRAMS = 32, 256, 128


@triton.jit(do_not_specialize=["tokens"])
def rows_product(
    parts, x, matrix, rows, slots, tokens, across, stride, width,
    count: tl.constexpr, T: tl.constexpr, ROWS: tl.constexpr, IN: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """parts[p, t, i] = Σ matrix[rows[i], j]·x[t, j] over chunk p of the inputs j, in float32."""
    t = tl.program_id(2) * T + tl.arange(0, T)
    mine = tl.load(slots + t, mask=t < tokens, other=-1) >= 0
    if tl.max(mine.to(tl.int32), axis=0) == 0:
        return
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at = tl.load(rows + i, mask=i < count, other=-1)
    chunk = tl.program_id(1)
    k = chunk * CHUNK + tl.arange(0, IN)
    left_of = x + t[:, None].to(tl.int64) * across + k[None, :]
    right_of = matrix + at[:, None].to(tl.int64) * stride + k[None, :]
    total = tl.zeros((T, ROWS), dtype=tl.float32)
    for first in range(0, CHUNK, IN):
        here = (k < width - first)[None, :]
        left = tl.load(left_of + first, mask=mine[:, None] & here, other=0)
        right = tl.load(right_of + first, mask=(at >= 0)[:, None] & here, other=0)
        total = tl.dot(left, tl.trans(right), acc=total, input_precision="ieee")
    place = parts + (chunk * tokens + t[:, None]).to(tl.int64) * count + i[None, :]
    tl.store(place, total, mask=mine[:, None] & (i < count)[None, :])


@triton.jit(do_not_specialize=["tokens"])
def core_of_parts(
    h, parts, slots, bank, ranks, tokens, apart,
    n: tl.constexpr, r: tl.constexpr, PARTS: tl.constexpr, PADDED: tl.constexpr,
    OUT: tl.constexpr, IN: tl.constexpr,
):  # fmt: skip
    """h[t, s] = U[slot, s]·Σ_p parts[p, t, s]: OUT entries for each program."""
    blocks: tl.constexpr = (r + OUT - 1) // OUT
    t, s = tl.program_id(0), tl.program_id(1) // blocks
    slot = tl.load(slots + t)
    if slot < 0:
        return
    rank = tl.minimum((tl.load(ranks + slot) + 7) // 8, r // 8) * 8
    i = tl.program_id(1) % blocks * OUT + tl.arange(0, OUT)
    p = tl.arange(0, PADDED)
    U_of = bank + slot.to(tl.int64) * apart + s * r * r + i[:, None] * r
    given = parts + ((p[:, None] * tokens + t).to(tl.int64) * n + s) * r
    total = tl.zeros((OUT,), dtype=tl.float32)
    for first in range(0, r, IN):
        k = first + tl.arange(0, IN)
        inside = (i[:, None] < rank) & (k[None, :] < rank)
        U = tl.load(U_of + k[None, :], mask=inside, other=0).to(tl.float32)
        each = tl.load(given + k[None, :], mask=(p < PARTS)[:, None] & (k < rank)[None, :], other=0)
        total += tl.sum(U * tl.sum(each, axis=0)[None, :], axis=1)
    tl.store(h + (t * n + s) * r + i, total.to(h.dtype.element_ty), mask=i < r)


class _Beside(NamedTuple):
    """A stream beside the engine's own, and what each of the two waits for."""

    stream: torch.cuda.Stream
    begun: torch.cuda.Event
    done: torch.cuda.Event


@cache
def prepare_stream(device: torch.device) -> _Beside:
    """Return what is needed on a GPU; the first call must not be in a CUDA graph."""
    return _Beside(torch.cuda.Stream(device), torch.cuda.Event(), torch.cuda.Event())


@contextmanager
def _on_stream(device: torch.device) -> Iterator[None]:
    """Launch on the other stream, after all that this one has been given so far."""
    if device.type != "cuda":
        yield
        return
    stream, begun, done = prepare_stream(device)
    begun.record(torch.cuda.current_stream(device))
    stream.wait_event(begun)
    with torch.cuda.stream(stream):
        try:
            yield
        finally:
            done.record(stream)


def join(device: torch.device) -> None:
    """Have the current stream wait for what the last :func:`begin` has launched."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).wait_event(prepare_stream(device).done)


def begin(
    x: Tensor, matrix: Tensor, slots: Tensor, rows: Tensor, bank: Tensor, ranks: Tensor
) -> Tensor:
    """Return ``(T, n, r)``, which is h once :func:`join` was called; x must not change until then.

    Of a token without an adapter it holds anything.

    Args:
        x: ``(T, in)``, of at least one token; each row is contiguous.
        matrix: ``(any, in)``, of x's dtype; each row is contiguous.
        slots: ``(T,)`` int64; −1 is none.
        rows: ``(n, r)`` int32, rows of ``matrix``; −1 where a slice has fewer.
        bank: ``(slots + 1, n, r, r)``, each slot contiguous.
        ranks: ``(slots + 1,)`` int32.
    """
    (tokens, width), (n, r) = x.shape, rows.shape
    # From this stream's memory, to which it goes back when it has been used here.
    h = torch.empty(tokens, n, r, dtype=x.dtype, device=x.device)
    exact, padded = x.dtype == torch.float32, max(16, triton.next_power_of_2(r))
    tile, wide, deep = 16, 32, 32 if exact else 128
    if tokens > 16 and not exact:
        tile, wide, deep = 64, 64 if n * r > 32 else 32, 64
    blocks, tiles = triton.cdiv(n * r, wide), triton.cdiv(tokens, tile)
    wanted = min(triton.cdiv(_PROGRAMS, blocks * tiles), _PARTS)
    chunk = _INPUTS * triton.cdiv(width, _INPUTS * wanted)
    count = triton.cdiv(width, chunk)
    with _on_stream(x.device):
        parts = torch.empty(count, tokens, n, r, dtype=torch.float32, device=x.device)
        rows_product[(blocks, count, tiles)](
            parts, x, matrix, rows, slots, tokens, x.stride(0), matrix.stride(0), width, n * r,
            T=tile, ROWS=wide, IN=deep, CHUNK=chunk, num_warps=4, num_stages=3,
        )  # fmt: skip
        out, deep = min(padded, 32), min(padded, 64)
        core_of_parts[(tokens, n * triton.cdiv(r, out))](
            h, parts, slots, bank, ranks, tokens, bank.stride(0), n, r,
            PARTS=count, PADDED=triton.next_power_of_2(count), OUT=out, IN=deep,
            num_warps=4 if deep > 32 else 1,
        )  # fmt: skip
    return h
