"""Folding adapters into weights: index -> plan -> stream -> write.

:func:`fold_stream` is the core, and knows no files; :func:`write_merge` is one of its consumers.
The names load on first use, so that ``secura-merge --help`` does not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

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


def __getattr__(name: str) -> Any:
    """Import the module behind a public name on first use.

    Raises:
        AttributeError: ``name`` is not public.
    """
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
