"""The adapter step on a GPU in two Triton launches, as the torch op ``secura_gpu::step_``.

The first makes h = U_slot·g of every token and slice, g gathered from the base linear's own output;
the second adds C·h to that output, a block of tokens and columns at a time. A token without an
adapter costs a comparison, a narrow adapter its own rank, a batch without any adapter no launch at
all: a flag on the CPU says so, and a CUDA graph that was captured for such batches has no step in
it. Grids depend on shapes alone. Imported on GPUs only (and, with ``TRITON_INTERPRET=1``, by the
tests).
"""

from __future__ import annotations

from functools import cache
from math import gcd
from typing import Any

import torch
import triton
from torch import Tensor

from secura_serve.serve.kernels import triton_code

__all__ = ["COLUMNS", "alignment", "blocks", "dependent_launch", "launch"]

COLUMNS = 128
"""Columns of y that one program of the second kernel adds to."""
# The largest batch for which vLLM captures a graph: larger ones are mostly prompts, whose tokens
# share an adapter with their neighbours.
_DECODE = 512
# From here on U is worth a matrix product of its own.
_GROUPED_RANK = 64


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


def alignment(starts: list[int]) -> int:
    """Return the largest power of two, up to 8, that divides where slices begin and end."""
    return gcd(8, *starts)


@cache
def dependent_launch(device: torch.device) -> bool:
    """Return whether a kernel may start before the one ahead has ended: NVIDIA, from sm_90 on."""
    if device.type != "cuda" or torch.version.cuda is None:
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)


def launch(
    y: Tensor,
    source: Tensor | None,
    slots: Tensor,
    rows: Tensor,
    bank: Tensor,
    ranks: Tensor,
    C: Tensor,
    offset: Tensor | None,
    table: Tensor,
    active: Tensor,
    align: int,
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
        table: see :func:`blocks`.
        active: ``()`` bool on the CPU: whether any token has an adapter.
        align: see :func:`alignment`.
    """
    tokens, (n, r) = y.shape[0], rows.shape
    if not tokens or not active.item():
        return
    h = torch.empty(tokens, n, r, dtype=y.dtype, device=y.device)
    given = y if source is None else source
    padded = max(16, triton.next_power_of_2(r))
    early = dependent_launch(y.device)
    extra: dict[str, Any] = {"launch_pdl": True} if early else {}
    common = (slots, rows, bank, ranks, offset)
    # Without tensor cores a product is unrolled into registers, and large tiles spill.
    half = y.dtype != torch.float32
    if half and tokens > _DECODE and r >= _GROUPED_RANK:
        tile, wide = 32, min(padded, 64)
        triton_code.core_grouped[(triton.cdiv(tokens, tile), n * triton.cdiv(r, wide))](
            h, given, *common, tokens, given.stride(0), bank.stride(0), n, r,
            BIASED=offset is not None, T=tile, OUT=wide, IN=wide, PDL=early, num_warps=8,
            num_stages=1, **extra,
        )  # fmt: skip
    else:
        tall, wide = min(padded, 32), min(padded, 128)
        triton_code.core[(tokens, n * triton.cdiv(r, tall))](
            h, given, *common, given.stride(0), bank.stride(0), n, r,
            BIASED=offset is not None, OUT=tall, IN=wide, PDL=early,
            num_warps=max(tall * wide // 1024, 1), **extra,
        )  # fmt: skip
    tile = 64 if half and tokens >= 64 else 16
    triton_code.expand[(triton.cdiv(tokens, tile), table.shape[0])](
        y, h, slots, C, table, tokens, y.stride(0), C.shape[1], n, r,
        T=tile, COLUMNS=COLUMNS, K=min(padded, 64 if half else 16), ALIGN=align, PDL=early,
        num_warps=4 if half and tile == 16 else 8, num_stages=2, **extra,
    )  # fmt: skip


# Not torch.library.custom_op, which costs 26 instead of 7 µs a call where no graph is captured.
_LIBRARY = torch.library.Library("secura_gpu", "DEF")
_LIBRARY.define(
    "step_(Tensor(a!) y, Tensor? source, Tensor slots, Tensor rows, Tensor bank, Tensor ranks, "
    "Tensor C, Tensor? offset, Tensor table, Tensor active, int align) -> ()"
)
for _key in ("CUDA", "CPU"):
    _LIBRARY.impl("step_", launch, _key)
torch.library.register_fake("secura_gpu::step_", lambda *args: None, lib=_LIBRARY)
