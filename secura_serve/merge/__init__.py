"""Folding adapters into weights: source -> plan -> stream -> write.

:func:`fold_stream` does the work and knows no files; :func:`write_merge` is one of its consumers.
The names load on first use, so that ``secura-merge --help`` does not wait for torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from secura_serve.lazy import lazy

if TYPE_CHECKING:
    from secura_serve.merge.check import check_merge as check_merge
    from secura_serve.merge.config import MergeConfig as MergeConfig
    from secura_serve.merge.fold import Change as Change
    from secura_serve.merge.fold import Gathered as Gathered
    from secura_serve.merge.fold import Journal as Journal
    from secura_serve.merge.fold import Part as Part
    from secura_serve.merge.fold import Target as Target
    from secura_serve.merge.fold import bits_to_keep as bits_to_keep
    from secura_serve.merge.fold import fold_shard as fold_shard
    from secura_serve.merge.fold import fold_weight as fold_weight
    from secura_serve.merge.fold import folds_by_shard as folds_by_shard
    from secura_serve.merge.fold import gather_shard as gather_shard
    from secura_serve.merge.fold import undo_shard as undo_shard
    from secura_serve.merge.lora import export_lora as export_lora
    from secura_serve.merge.plan import MergePlan as MergePlan
    from secura_serve.merge.plan import plan_merge as plan_merge
    from secura_serve.merge.restore import restore_base as restore_base
    from secura_serve.merge.source import Source as Source
    from secura_serve.merge.source import open_source as open_source
    from secura_serve.merge.source import plan_fold as plan_fold
    from secura_serve.merge.spec import MAX_WEIGHT as MAX_WEIGHT
    from secura_serve.merge.stream import FoldPlan as FoldPlan
    from secura_serve.merge.stream import fold_stream as fold_stream
    from secura_serve.merge.update import update_stream as update_stream
    from secura_serve.merge.verify import base_stamp as base_stamp
    from secura_serve.merge.verify import verify_base as verify_base
    from secura_serve.merge.write import write_merge as write_merge

_HOMES = {
    "Change": "fold",
    "FoldPlan": "stream",
    "Gathered": "fold",
    "Journal": "fold",
    "MAX_WEIGHT": "spec",
    "MergeConfig": "config",
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
if not TYPE_CHECKING:
    __getattr__ = lazy(__name__, _HOMES)
