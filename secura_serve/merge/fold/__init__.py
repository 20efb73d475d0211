"""The fold of one weight: as it passes through a stream, or of a rank's shard where it lies.

The kernels for a GPU stand in :mod:`~secura_serve.merge.fold.triton_fold`, which is imported only
where they run.
"""

from __future__ import annotations

from secura_serve.merge.fold.journal import Journal
from secura_serve.merge.fold.shard import (
    bits_to_keep,
    fold_shard,
    folds_by_shard,
    gather_shard,
    undo_shard,
)
from secura_serve.merge.fold.target import Gathered, Part, Target, gather_target
from secura_serve.merge.fold.weight import Change, fold_weight, takes_triton

__all__ = [
    "Change",
    "Gathered",
    "Journal",
    "Part",
    "Target",
    "bits_to_keep",
    "fold_shard",
    "fold_weight",
    "folds_by_shard",
    "gather_shard",
    "gather_target",
    "takes_triton",
    "undo_shard",
]
