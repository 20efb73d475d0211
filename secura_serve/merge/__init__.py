"""Folding adapters into weights: source -> plan -> stream -> write.

:func:`fold_stream` does the work and knows no files; :func:`write_merge` is one of its consumers.
The names load on first use, so that ``secura-merge --help`` does not wait for torch.
"""

from __future__ import annotations

from secura_serve.lazy import lazy

_HOMES = {
    "Change": "fold",
    "FoldPlan": "stream",
    "Gathered": "fold",
    "Journal": "fold",
    "MAX_WEIGHT": "spec",
    "MergePlan": "plan",
    "Part": "fold",
    "Source": "source",
    "Target": "fold",
    "base_stamp": "verify",
    "bits_to_keep": "fold",
    "check_merge": "check",
    "export_lora": "lora",
    "fold_shard": "fold",
    "fold_stream": "stream",
    "fold_weight": "fold",
    "folds_by_shard": "fold",
    "gather_shard": "fold",
    "open_source": "source",
    "plan_fold": "source",
    "plan_merge": "plan",
    "restore_base": "restore",
    "undo_shard": "fold",
    "update_stream": "update",
    "verify_base": "verify",
    "write_merge": "write",
}

__all__ = [*_HOMES]
__getattr__ = lazy(__name__, _HOMES)
