"""The fold of one weight on a GPU: two launches for an adapter, one more for each further part.

The first makes L = w·C·U, C gathered from W on the way; the second reads W once, takes R's rows
from it, applies the norm and writes W' once. torch's own fold makes Δ in blocks that fit a CPU's
cache: hundreds of launches a weight. A shard is the same two launches in place, with C and R
gathered beforehand. Imported on GPUs only (and, with ``TRITON_INTERPRET=1``, by the tests).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from secura_serve.errors import MergeError
from secura_serve.merge.fold import triton_code
from secura_serve.merge.fold.journal import Journal
from secura_serve.merge.fold.target import Gathered, Target
from secura_serve.method import MagNorm
from secura_serve.method.native import FORMS

__all__ = [
    "Moved",
    "fold_in_place",
    "fold_on_gpu",
    "move",
    "move_cores",
    "supports",
    "take_back",
    "tallest",
]

# Numbers of W that the parts of a float32 can be made of without leaving its range.
_SPLIT = (torch.bfloat16,)


def supports(W: Tensor, target: Target, norm: MagNorm) -> bool:
    """Return whether these kernels fold such a weight: a norm in closed form, ρ_max known."""
    known = not norm.needs_rho_max or target.parts[0].rho_max is not None
    halves = W.dtype in (torch.bfloat16, torch.float16, torch.float32)
    return norm.entry.native is not None and known and halves


def tallest(device: torch.device) -> int:
    """Return the rows of a tile: 64, or 32 where Triton 3.6 fails on larger ones (sm_100)."""
    later = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (10, 0)
    return 32 if later else 64


class Moved(NamedTuple):
    """What a fold needs of its adapters, on the device."""

    indices: Tensor
    """``(2·Σr,)`` int32: the rows of all parts, then their columns."""
    cores: Tensor
    """``(Σr²,)`` float32: U of every part."""


def move(target: Target, shape: tuple[int, int], device: torch.device) -> Moved:
    """Copy a target's indices and cores to a device, in two copies, without waiting.

    Args:
        shape: ``(out, in)`` of W.

    Raises:
        MergeError: an index that W does not have.
    """
    for part in target.parts:
        if int(part.basis.rows.max()) >= shape[0] or int(part.basis.cols.max()) >= shape[1]:
            raise MergeError(f"{target.module}: indices beyond the base's shape {shape}")
    indices = [part.basis.rows for part in target.parts] + [p.basis.cols for p in target.parts]
    return Moved(_to(torch.cat(indices).to(torch.int32), device), move_cores(target, device))


def move_cores(target: Target, device: torch.device) -> Tensor:
    """Copy a target's cores to a device without waiting: ``(Σr²,)`` float32."""
    return _to(torch.cat([part.U.float().flatten() for part in target.parts]), device)


@torch.no_grad()
def fold_on_gpu(
    W: Tensor,
    target: Target,
    norm: MagNorm,
    dtype: torch.dtype,
    bad: Tensor,
    moved: Moved | None = None,
) -> Tensor:
    """Return W' of one weight, rounded once to ``dtype``.

    Args:
        W: pristine, ``(out, in)``, or ``(in, out)`` where the target is ``transposed``.
        bad: ``(1,)`` int32, set to 1 where W' holds NaN or Inf, and else left as it is.
        moved: what :func:`move` returned, where that was called before.

    Raises:
        MergeError: an index that W does not have.

    Peak memory: W, W' and L, ``Σr·out`` float32.
    """
    new = torch.empty(W.shape, dtype=dtype, device=W.device)
    base, made = (W.T, new.T) if target.transposed else (W, new)
    out, width = base.shape
    indices, cores = moved or move(target, (out, width), W.device)
    total = sum(_ranks(target))
    cols = indices[total:].split(_ranks(target))
    L = _left([base] * len(cols), cols, target, cores)
    _fold(made, bad, base, target, norm, L, base, indices)
    return new


@torch.no_grad()
def fold_in_place(
    held: Tensor,
    target: Target,
    norm: MagNorm,
    gathered: Gathered,
    flags: Tensor,
    old: Journal | None = None,
    new: Journal | None = None,
    cores: Tensor | None = None,
) -> None:
    """Fold a shard where it lies: :func:`~secura_serve.merge.fold.shard.fold_shard` on a GPU.

    Args:
        cores: what :func:`move_cores` returned, where that was called before.
    """
    cores = move_cores(target, held.device) if cores is None else cores
    L = _left(gathered.C, [None] * len(target.parts), target, cores)
    R = gathered.R[0] if len(gathered.R) == 1 else torch.cat(gathered.R)
    _fold(held, flags, held, target, norm, L, R, None, old, new)


@torch.no_grad()
def take_back(held: Tensor, journal: Journal, flags: Tensor) -> None:
    """Make W of W' where it lies, in one launch; sets ``flags`` as a fold does."""
    _fold(held, flags, held, None, MagNorm(), None, None, None, journal)


def _ranks(target: Target) -> list[int]:
    return [len(part.basis.rows) for part in target.parts]


def _tile(W: Tensor) -> tuple[bool, int, int]:
    """Return whether float32 is split, and the rows and columns of a tile."""
    split = W.dtype in _SPLIT
    return (True, tallest(W.device), 128) if split else (False, 16, 64)


def _left(
    sources: Sequence[Tensor], cols: Sequence[Tensor | None], target: Target, cores: Tensor
) -> Tensor:
    """Return L ``(out, Σr)``: w·C·U of each part, C being columns of its source or all of it."""
    ranks, out = _ranks(target), sources[0].shape[0]
    L = torch.empty(out, sum(ranks), dtype=torch.float32, device=sources[0].device)
    split, tall, _ = _tile(sources[0])
    first = core = 0
    for part, source, at, r in zip(target.parts, sources, cols, ranks, strict=True):
        padded = max(16, triton.next_power_of_2(r))
        step, deep = min(padded, 32), min(padded, 32 if split else 16)
        triton_code.left[(triton.cdiv(out, tall), triton.cdiv(r, step))](
            L, source, at, cores[core:], float(part.weight), out, *source.stride(),
            first=first, r=r, wide=sum(ranks), ROWS=tall, OUT=step, IN=deep, SPLIT=split,
            # Loads of C as it is are so wide that sm_100 would spill with more.
            num_warps=4 if at is None else 8,
        )  # fmt: skip
        first, core = first + r, core + r * r
    return L


def _fold(
    made: Tensor,
    bad: Tensor,
    base: Tensor,
    target: Target | None,
    norm: MagNorm,
    L: Tensor | None,
    R: Tensor | None,
    rows: Tensor | None,
    old: Journal | None = None,
    new: Journal | None = None,
) -> None:
    """Launch the second kernel: ``made`` of ``base``, which may be the same memory.

    Args:
        target: None makes the base itself.
        R: ``(Σr, in)``, or what ``rows`` are taken of.
    """
    form = norm.entry.native
    assert form is not None
    values = dict(norm.parameters)
    a, b = (0.0 if name is None else values[name] for name in form.arguments)
    peak = 0.0 if target is None else float(target.parts[0].rho_max or 0)
    total = 0 if L is None else L.shape[1]
    (out, width), (split, tall, wide) = base.shape, _tile(base)
    padded = max(16, triton.next_power_of_2(total))
    triton_code.fold[(triton.cdiv(width, wide), triton.cdiv(out, tall))](
        made, bad, base, L, R, rows, old and old.data, new and new.data, out, width,
        *base.stride(), *(base if R is None else R).stride(), *made.stride(), a, b, peak,
        k_all=total, FORM=FORMS[form.form], TINY=torch.finfo(torch.float32).tiny,
        OLD=old.bits if old else 0, NEW=new.bits if new else 0, ROWS=tall, COLUMNS=wide,
        K=min(padded, 32 if split else 16), SPLIT=split, num_warps=8 if split else 4, num_stages=2,
    )  # fmt: skip


def _to(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a small CPU tensor without waiting for the device."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
