"""Folding adapters into weights: index -> plan -> stream -> write.

:func:`fold_stream` is the core, and knows no files; :func:`write` is one of its consumers.
"""

from __future__ import annotations

from secura_serve.merge.lora import export_lora
from secura_serve.merge.plan import MergePlan, plan_merge
from secura_serve.merge.restore import restore
from secura_serve.merge.source import Source, open_source, plan_fold
from secura_serve.merge.stream import Change, FoldPlan, Part, Target, fold, fold_stream
from secura_serve.merge.write import write

__all__ = [
    "Change",
    "FoldPlan",
    "MergePlan",
    "Part",
    "Source",
    "Target",
    "export_lora",
    "fold",
    "fold_stream",
    "open_source",
    "plan_fold",
    "plan_merge",
    "restore",
    "write",
]
