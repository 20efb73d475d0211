"""The fold of what one rank holds of a weight, in place: W' = S-MagNorm(W, Σᵢ wᵢ·Cᵢ·Uᵢ·Rᵢ).

A rank needs C of its own rows and R of its own columns, and nothing else of the whole W: every
mode is elementwise but for ρ_max, which the adapter's file brings along. C and R are gathered
beforehand, from the whole W, so that the shard can be overwritten while it is read.
"""

from __future__ import annotations

import torch
from torch import Tensor

from secura_serve.merge.fold.journal import Journal, journal_bits
from secura_serve.merge.fold.target import Gathered, Target, gather_target
from secura_serve.merge.fold.weight import factors, takes_triton
from secura_serve.method import MagNorm, write

__all__ = [
    "bits_to_keep",
    "fold_shard",
    "folds_by_shard",
    "gather_shard",
    "undo_shard",
]


def folds_by_shard(target: Target, norm: MagNorm) -> bool:
    """Return whether a shard can be folded without the rest of W: not where ρ_max is unknown."""
    return not norm.needs_rho_max or target.parts[0].rho_max is not None


def gather_shard(
    tensor: Tensor, target: Target, rows: slice, cols: slice, *, checked: bool = False
) -> tuple[Gathered, list[str]]:
    """Return C and R of a shard, in memory of their own, and every reason not to fold.

    Args:
        tensor: the whole weight as the base's file has it.
        rows, cols: of W, those that the shard holds.
        checked: the fingerprints of this weight are known to be right.
    """
    gathered, problems = gather_target(tensor, target, checked=checked)
    C, R = [C[rows] for C, _ in gathered], [R[:, cols] for _, R in gathered]
    return Gathered(*(tuple(t.contiguous() for t in side) for side in (C, R))), problems


@torch.no_grad()
def fold_shard(
    held: Tensor,
    target: Target,
    norm: MagNorm,
    gathered: Gathered,
    flags: Tensor,
    old: Journal | None = None,
    new: Journal | None = None,
) -> None:
    """Fold one shard where it lies, rounded once to its dtype.

    Args:
        held: ``(rows, columns)`` of the pristine W; with ``old``, of the W' that it was kept for.
        gathered: on the device of ``held``.
        flags: ``(2,)`` int32. The first is set where W' holds NaN or Inf, the second where ``new``
            cannot hold what happened; else they are left as they are.
        old, new: journals, which may be one and the same memory; ``new`` where
            :func:`bits_to_keep` says so.

    Peak memory: C, R and L, ``Σr·rows`` float32; where torch folds also W'.
    """
    if takes_triton(held, target, norm):
        from secura_serve.merge.fold.triton_fold import fold_in_place

        fold_in_place(held, target, norm, gathered, flags, old, new)
        return
    assert new is None
    if old is not None:
        undo_shard(held, old, flags)
    wide = torch.promote_types(held.dtype, torch.float32)
    update = factors(target.parts, zip(*gathered, strict=True), wide)
    write(made := torch.empty_like(held), held, update, norm, peak=target.parts[0].rho_max)
    held.copy_(made)
    flags[0] |= (~torch.isfinite(made)).any()


def bits_to_keep(held: Tensor, target: Target, norm: MagNorm) -> int:
    """Return the bits of the journal that a fold of this shard can leave: 4, 8, or 0 for none."""
    return journal_bits(norm, held.dtype) if takes_triton(held, target, norm) else 0


def undo_shard(held: Tensor, journal: Journal, flags: Tensor) -> None:
    """Make W of the W' that a journal was kept for, where it lies: on a GPU, in one launch."""
    from secura_serve.merge.fold.triton_fold import take_back

    take_back(held, journal, flags)
