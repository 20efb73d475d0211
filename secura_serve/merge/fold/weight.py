"""The fold of one weight: W' = S-MagNorm(W, Σᵢ wᵢ·Cᵢ·Uᵢ·Rᵢ), C and R taken from the pristine W."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor

from secura_serve.merge.fold.target import Part, Target
from secura_serve.merge.io.buffers import buffer
from secura_serve.method import FoldStats, MagNorm, gather, write

__all__ = ["Change", "factors", "fold_weight", "takes_triton"]


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
    def of(cls, stats: FoldStats) -> Change:
        """Return what the stats of a whole weight say."""
        base, moved, update, lost, top = stats
        return cls(
            relative=math.sqrt(moved / base) if base else 0.0,
            largest=top,
            lost=math.sqrt(lost / update) if update else 0.0,
            norm=math.sqrt(base),
            update=math.sqrt(update),
        )

    @classmethod
    def combined(cls, changes: Iterable[Change]) -> Change:
        """Return the change of several weights taken as one."""
        parts = (
            FoldStats(
                c.norm**2, (c.relative * c.norm) ** 2, c.update**2, (c.lost * c.update) ** 2,
                c.largest,
            )
            for c in changes
        )  # fmt: skip
        return cls.of(FoldStats.total(parts))


def _allocate_like(W: Tensor, dtype: torch.dtype, allocate: Callable[[int], Tensor]) -> Tensor:
    if W.device.type != "cpu":
        return torch.empty(W.shape, dtype=dtype, device=W.device)
    return allocate(W.numel() * dtype.itemsize).view(dtype).view(W.shape)


def factors(
    parts: Iterable[Part], gathered: Iterable[tuple[Tensor, Tensor]], wide: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return L ``(out, Σr)`` and R ``(Σr, in)`` in ``wide`` with Σ wᵢ·Cᵢ·Uᵢ·Rᵢ = L·R.

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
def fold_weight(
    W: Tensor,
    target: Target,
    norm: MagNorm,
    dtype: torch.dtype,
    *,
    measure: bool = True,
    allocate: Callable[[int], Tensor] = buffer,
    gathered: Sequence[tuple[Tensor, Tensor]] | None = None,
) -> tuple[Tensor, Change | None]:
    """Return W' of one weight, rounded once to ``dtype``.

    The update is one product L·R with inner dimension Σr, made and applied a few rows at a time:
    W is read once, W' is written once, and everything between stays in cache.

    Args:
        W: pristine, ``(out, in)``, or ``(in, out)`` where the target is ``transposed``.
        measure: also return what changed; where torch folds, it costs as much as the fold itself.
        allocate: returns CPU memory for W': from a number of bytes, ``(nbytes,)`` uint8.
        gathered: C and R of each part, where they are gathered already.

    Returns:
        W' in W's orientation, contiguous, and its :class:`Change` where it was asked for or free.

    Peak memory: W, W', L and R (``Σr·(out + in)`` float32), where torch folds a few MiB more.
    """
    wide = torch.promote_types(W.dtype, torch.float32)
    result = _allocate_like(W, dtype, allocate)
    if gathered is None:
        rows = W.T if target.transposed else W
        gathered = [gather(rows, part.basis) for part in target.parts]
    L, R = factors(target.parts, gathered, wide)
    # As W lies in memory: (L·R)ᵀ = Rᵀ·Lᵀ, number by number the same sums.
    update = (R.T.contiguous(), L.T.contiguous()) if target.transposed else (L, R)
    stats = write(result, W, update, norm, peak=target.parts[0].rho_max, measure=measure)
    return result, None if stats is None else Change.of(stats)


def takes_triton(tensor: Tensor, target: Target, norm: MagNorm) -> bool:
    """Return whether a tensor lies on a GPU where Triton folds it, in two launches."""
    if tensor.device.type != "cuda" or tensor.ndim != 2 or find_spec("triton") is None:
        return False
    from secura_serve.merge.fold.triton_fold import supports

    return supports(tensor, target, norm)
