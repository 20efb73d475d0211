"""The fold of one weight: W' = S-MagNorm(W, Σᵢ wᵢ·Cᵢ·Uᵢ·Rᵢ), C and R taken from the pristine W."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from secura_serve.method import Basis, MagNorm, Sums, gather, write

__all__ = ["Change", "Part", "Target", "buffer", "factors", "fold"]

# Elements per block of rows: its update, in float32, stays in a core's L2 cache.
_BLOCK = 2**18
# Never fewer rows: a matrix product of very few rows takes another path through the BLAS, whose
# sums may end in another last bit than those of the whole matrix.
_ROWS = 16


@dataclass(frozen=True)
class Part:
    """One adapter's share in a target: ``weight``·C·U·R."""

    adapter: str
    weight: float
    U: Tensor
    basis: Basis
    print: str
    """The fingerprint of the base that it was trained on, see :mod:`secura_serve.adapter`."""
    rho_max: float | None = None


@dataclass(frozen=True)
class Target:
    """One tensor that changes."""

    module: str
    parts: tuple[Part, ...]
    transposed: bool = False
    """The tensor is W as ``(in, out)``: GPT-2's Conv1D."""


@dataclass(frozen=True)
class Change:
    """What folding did to one weight, W' being what is written."""

    relative: float
    """‖W'−W‖ / ‖W‖."""
    largest: float
    """max |W'−W| / |W| over the weights that are not 0."""
    lost: float
    """Share of the update lost to rounding: ‖W' − W'₃₂‖ / ‖W'₃₂ − W‖, W'₃₂ before rounding."""
    norm: float
    """‖W‖."""
    update: float
    """‖W'₃₂ − W‖."""

    @classmethod
    def of(cls, blocks: Iterable[Sums]) -> Change:
        """Add up what was found block by block."""
        base, moved, update, lost, top = zip(*blocks, strict=True)
        return cls(
            relative=math.sqrt(sum(moved) / sum(base)) if sum(base) else 0.0,
            largest=max(top),
            lost=math.sqrt(sum(lost) / sum(update)) if sum(update) else 0.0,
            norm=math.sqrt(sum(base)),
            update=math.sqrt(sum(update)),
        )

    @classmethod
    def together(cls, changes: Iterable[Change]) -> Change:
        """The same of several weights taken as one."""
        return cls.of(
            Sums(
                c.norm**2, (c.relative * c.norm) ** 2, c.update**2, (c.lost * c.update) ** 2,
                c.largest,
            )
            for c in changes
        )  # fmt: skip


def buffer(nbytes: int) -> Tensor:
    """Uninitialised bytes on the CPU, ``(nbytes,)`` uint8.

    NumPy asks the kernel for huge pages, without which the page faults of a fresh buffer cost
    more than what is done with it.
    """
    return torch.from_numpy(np.empty(nbytes, np.uint8))


def _like(W: Tensor, dtype: torch.dtype, allocate: Callable[[int], Tensor]) -> Tensor:
    if W.device.type != "cpu":
        return torch.empty(W.shape, dtype=dtype, device=W.device)
    return allocate(W.numel() * dtype.itemsize).view(dtype).view(W.shape)


def factors(
    parts: Iterable[Part], gathered: Iterable[tuple[Tensor, Tensor]], wide: torch.dtype
) -> tuple[Tensor, Tensor]:
    """L ``(out, Σr)`` and R ``(Σr, in)`` in ``wide`` with Σ wᵢ·Cᵢ·Uᵢ·Rᵢ = L·R.

    Args:
        gathered: C ``(out, r)`` and R ``(r, in)`` of each part, as W holds them.
    """
    left, right = [], []
    for part, (C, R) in zip(parts, gathered, strict=True):
        CU = C.to(wide) @ part.U.to(C.device, wide)
        left.append(CU if part.weight == 1 else CU * part.weight)
        right.append(R.to(wide))
    return (torch.cat(left, 1), torch.cat(right)) if len(left) > 1 else (left[0], right[0])


@torch.no_grad()
def fold(
    W: Tensor,
    target: Target,
    norm: MagNorm,
    dtype: torch.dtype,
    *,
    measure: bool = True,
    allocate: Callable[[int], Tensor] = buffer,
    gathered: Sequence[tuple[Tensor, Tensor]] | None = None,
) -> tuple[Tensor, Change | None]:
    """W' of one weight, rounded once to ``dtype``.

    The update is one product L·R with inner dimension Σr, made and applied a block of rows at a
    time: W is read once, W' written once, everything between stays in cache.

    Args:
        W: pristine, ``(out, in)``, or ``(in, out)`` where the target says ``transposed``.
        measure: also say what changed; where torch folds, it costs as much as the fold itself.
        allocate: gives the CPU memory of W', so many bytes, ``(nbytes,)`` uint8.
        gathered: C and R of each part, where they are at hand already.

    Returns:
        W' in W's orientation, contiguous, and its :class:`Change` where it was asked for or free.

    Peak memory: W, W', L and R (``Σr·(out + in)`` float32) and a few blocks of 1 MiB.
    """
    wide = torch.promote_types(W.dtype, torch.float32)
    result = _like(W, dtype, allocate)
    rows, new = (W.T, result.T) if target.transposed else (W, result)
    if gathered is None:
        gathered = [gather(rows, part.basis) for part in target.parts]
    L, R = factors(target.parts, gathered, wide)
    peak = target.parts[0].rho_max
    step = max(_ROWS, _BLOCK // max(1, rows.shape[1]))
    # One for all blocks: a fresh one each time would come as page faults.
    space = torch.empty(min(step, len(rows)), rows.shape[1], dtype=wide, device=W.device)

    def one(at: slice) -> Sums | None:
        left = L[at]
        delta = torch.mm(left, R, out=space[: len(left)])
        return write(new[at], rows[at], delta, norm, peak=peak, measure=measure)

    found = [one(slice(start, start + step)) for start in range(0, len(rows), step)]
    return result, None if None in found else Change.of(sums for sums in found if sums)
