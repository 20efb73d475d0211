"""The adapter step on a GPU in two Triton launches, as the torch op ``secura_gpu::step_``.

The first makes h = U_slot·g of every token and slice, g gathered from the base linear's own output;
the second adds C·h to that output, a block of tokens and columns at a time. A token without an
adapter costs a comparison, a narrow adapter its own rank, a batch without any adapter no launch at
all: a flag on the CPU says so, and a CUDA graph that was captured for such batches has no step in
it. Where a gated activation follows and reads the output anyway, the second adds C·h there
(``secura_gpu::activated``) and takes the place of the base's own launch. Grids depend on shapes
alone. Imported on GPUs only (and, with ``TRITON_INTERPRET=1``, by the tests).
"""

from __future__ import annotations

from functools import cache
from math import gcd
from typing import Any

import torch
import triton
from torch import Tensor

from secura_serve.serve.kernels import triton_code
from secura_serve.serve.kernels.activation import base_activation

__all__ = [
    "COLUMNS",
    "alignment",
    "blocks",
    "dependent_launch",
    "launch",
    "launch_activated",
    "launch_expand",
]

COLUMNS = 128
"""Columns of y that one program of the second kernel adds to."""
# The most tokens for one program, where so many programs are left: an H100's multiprocessors.
_TALL, _PROGRAMS = 128, 132
# Ranks that the second kernel takes at once.
_WIDEST = 64
# Batches and ranks for which one launch before an activation is better than two.
_FEW, _SMALL = 8, 32
# Larger batches are mostly prompts, whose tokens share an adapter with their neighbours.
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


def _options(device: torch.device, joins: bool = False) -> dict[str, Any]:
    """Return what every launch is given besides its arguments and tiles.

    Args:
        joins: whether it waits for two streams, and so for all kernels on them to end.
    """
    early = dependent_launch(device) and not joins
    return {"PDL": early, "launch_pdl": True} if early else {"PDL": False}


def _core(
    source: Tensor, slots: Tensor, rows: Tensor, bank: Tensor, ranks: Tensor, offset: Tensor | None
) -> Tensor:
    """Return h = U_slot·(source − offset)[rows], ``(T, n, r)``, in one launch; see :func:`launch`.

    Of a token without an adapter it holds anything.
    """
    tokens, (n, r) = source.shape[0], rows.shape
    h = torch.empty(tokens, n, r, dtype=source.dtype, device=source.device)
    padded, biased = max(16, triton.next_power_of_2(r)), offset is not None
    common = (h, source, slots, rows, bank, ranks, offset)
    if source.dtype != torch.float32 and tokens > _DECODE and r >= _GROUPED_RANK:
        tile, wide = 32, min(padded, 64)
        triton_code.core_grouped[(triton.cdiv(tokens, tile), n * triton.cdiv(r, wide))](
            *common, tokens, source.stride(0), bank.stride(0), n, r,
            BIASED=biased, T=tile, OUT=wide, IN=wide, num_warps=8, num_stages=1,
            **_options(source.device),
        )  # fmt: skip
    else:
        tall, wide = min(padded, 32), min(padded, 128)
        triton_code.core[(tokens, n * triton.cdiv(r, tall))](
            *common, source.stride(0), bank.stride(0), n, r,
            BIASED=biased, OUT=tall, IN=wide, num_warps=max(tall * wide // 1024, 1),
            **_options(source.device),
        )  # fmt: skip
    return h


def _tiles(
    tokens: int, column_blocks: int, r: int, dtype: torch.dtype, tallest: int = _TALL
) -> dict[str, Any]:
    """Return how the second kernel splits its work.

    A tile of tokens reads C once, so that large ones save traffic where they leave enough programs.
    """
    padded = max(16, triton.next_power_of_2(r))
    if dtype == torch.float32:
        # Without tensor cores a product is unrolled into registers, and large tiles spill.
        return {"T": 16, "K": min(padded, 16), "num_warps": 8, "num_stages": 2}
    tile = 64 if tokens >= 64 else 16
    if tokens // tallest * column_blocks >= _PROGRAMS:
        tile = max(tile, tallest)
    warps = 4 if tile == 16 else 8
    return {"T": tile, "K": min(padded, _WIDEST), "num_warps": warps, "num_stages": 2}


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
    """Add C·(U_slot·(source − offset)[rows]) to ``y`` in place.

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
    if not y.shape[0] or not active.item():
        return
    h = _core(y if source is None else source, slots, rows, bank, ranks, offset)
    launch_expand(y, h, slots, C, table, align)


def launch_expand(
    y: Tensor,
    h: Tensor,
    slots: Tensor,
    C: Tensor,
    table: Tensor,
    align: int,
    joins: bool = False,
) -> None:
    """Add C·h to ``y`` in place: the second launch of :func:`launch`, whose arguments these are.

    Args:
        h: ``(T, n, r)``.
        joins: whether h was made on another stream.
    """
    tokens, n, r = h.shape
    tiles = _tiles(tokens, table.shape[0], r, y.dtype)
    triton_code.expand[(triton.cdiv(tokens, tiles["T"]), table.shape[0])](
        y, h, slots, C, table, tokens, y.stride(0), C.shape[1], n, r,
        COLUMNS=COLUMNS, ALIGN=align, **tiles, **_options(y.device, joins),
    )  # fmt: skip


def launch_activated(
    y: Tensor,
    source: Tensor | None,
    slots: Tensor,
    rows: Tensor,
    bank: Tensor,
    ranks: Tensor,
    C: Tensor,
    offset: Tensor | None,
    active: Tensor,
    align: int,
    activation: str,
    h: Tensor | None = None,
) -> Tensor:
    """Return act(gate')·up' of the adapted output, ``(T, out/2)``, and leave ``y`` as it is.

    A batch without adapters takes the base's own activation; few tokens take a single launch.

    Args:
        y: ``(T, out)``, gate and up side by side.
        rows: ``(2, r)`` int32.
        activation: one of :data:`~secura_serve.serve.kernels.activation.ACTIVATIONS`.
        h: ``(T, 2, r)``, where it was made on another stream.

    The others are those of :func:`launch`.
    """
    tokens, r = y.shape[0], rows.shape[1]
    if not tokens or not active.item():
        return base_activation(y, activation)
    given, made = y if source is None else source, y.new_empty(tokens, y.shape[1] // 2)
    column_blocks = triton.cdiv(made.shape[1], COLUMNS)
    # It has two sums for each entry, so that tall tiles spill from here on.
    tiles = _tiles(tokens, column_blocks, r, y.dtype, _TALL if r <= _SMALL else 64)
    joins = h is not None
    if not joins and tokens <= _FEW and r <= min(_SMALL, tiles["K"]):
        # Each of its programs has the U of all its tokens in registers.
        tiles["num_warps"] = 8
    elif not joins:
        h = _core(given, slots, rows, bank, ranks, offset)
    triton_code.expand_activated[(triton.cdiv(tokens, tiles["T"]), column_blocks)](
        made, y, h, slots, C, given, rows, bank, ranks, offset, tokens, y.stride(0), y.shape[1],
        given.stride(0), bank.stride(0), r,
        BIASED=offset is not None, COLUMNS=COLUMNS, ALIGN=align, TANH=activation == "gelu_tanh",
        **tiles, **_options(y.device, joins),
    )  # fmt: skip
    return made


# Not torch.library.custom_op, which costs 26 instead of 7 µs a call where no graph is captured.
_LIBRARY = torch.library.Library("secura_gpu", "DEF")
_LIBRARY.define(
    "step_(Tensor(a!) y, Tensor? source, Tensor slots, Tensor rows, Tensor bank, Tensor ranks, "
    "Tensor C, Tensor? offset, Tensor table, Tensor active, int align) -> ()"
)
_LIBRARY.define(
    "activated(Tensor y, Tensor? source, Tensor slots, Tensor rows, Tensor bank, Tensor ranks, "
    "Tensor C, Tensor? offset, Tensor active, int align, str activation) -> Tensor"
)
for _key in ("CUDA", "CPU"):
    _LIBRARY.impl("step_", launch, _key)
    _LIBRARY.impl("activated", launch_activated, _key)
torch.library.register_fake("secura_gpu::step_", lambda *args: None, lib=_LIBRARY)
torch.library.register_fake(
    "secura_gpu::activated",
    lambda y, *args: y.new_empty(y.shape[0], y.shape[1] // 2),
    lib=_LIBRARY,
)
