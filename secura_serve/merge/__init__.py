"""Folding adapters into weights: index -> plan -> stream -> write.

:func:`fold_stream` is the core, and knows no files; :func:`write_merge` is one of its consumers.
The names load on first use, so that ``secura-merge --help`` does not wait for torch.
"""

from __future__ import annotations

from secura_serve.lazy import lazy

_HOMES = {
    "Change": "weight",
    "FoldPlan": "stream",
    "MergePlan": "plan",
    "Part": "weight",
    "Source": "source",
    "Target": "weight",
    "check_merge": "check",
    "export_lora": "lora",
    "fold": "weight",
    "fold_stream": "stream",
    "open_source": "source",
    "plan_fold": "source",
    "plan_merge": "plan",
    "prove": "proof",
    "restore_base": "restore",
    "seal": "proof",
    "write_merge": "write",
}

__all__ = [*_HOMES]
__getattr__ = lazy(__name__, _HOMES)
