"""Train, merge and serve CUR adapters (CURLoRA, SECURA).

The names below are the public API. They are looked up on first use, so ``import secura_serve``
stays instant and works where torch or vLLM is not installed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from secura_serve.lazy import lazy

if TYPE_CHECKING:
    from secura_serve.adapter import Adapter as Adapter
    from secura_serve.adapter import AdapterConfig as AdapterConfig
    from secura_serve.adapter import CURModule as CURModule
    from secura_serve.adapter import load as _load
    from secura_serve.adapter import load_basis as load_basis
    from secura_serve.adapter import save as _save
    from secura_serve.adapter import verify as _verify
    from secura_serve.bases import ResolvedBase as ResolvedBase
    from secura_serve.bases import resolve_base as resolve_base
    from secura_serve.checkpoint import Checkpoint as Checkpoint
    from secura_serve.errors import *  # noqa: F403
    from secura_serve.evaluate import register_task as register_task
    from secura_serve.merge import check_merge as check_merge
    from secura_serve.merge import export_lora as export_lora
    from secura_serve.merge import fold_stream as fold_stream
    from secura_serve.merge import open_source as open_source
    from secura_serve.merge import plan_fold as plan_fold
    from secura_serve.merge import plan_merge as plan_merge
    from secura_serve.merge import restore_base as restore_base
    from secura_serve.merge import write_merge as write_merge
    from secura_serve.method import MagNorm as MagNorm
    from secura_serve.method import Mode as Mode
    from secura_serve.method import Parameter as Parameter
    from secura_serve.method import register_mode as register_mode
    from secura_serve.method import register_rule as register_rule
    from secura_serve.serve.kernels import register_kernel as register_kernel
    from secura_serve.train import SecuraConfig as SecuraConfig
    from secura_serve.train import register_method as register_method
    from secura_serve.train import register_strategy as register_strategy

    load_adapter = _load
    save_adapter = _save
    verify_adapter = _verify

__version__ = "0.1.0"

# Public name -> the module that defines it, and its name there where that is another. To publish a
# name, add it here, to the imports above, which type checkers read, and to the list in
# tests/package/test_public.py.
_EXPORTS: dict[str, str] = {
    "AdapterError": "errors",
    "AdapterFormatError": "errors",
    "BaseMismatchError": "errors",
    "BaseModelError": "errors",
    "BasisFormatError": "errors",
    "ConfigError": "errors",
    "DataError": "errors",
    "EvaluationError": "errors",
    "FoldError": "errors",
    "IncompatibleVLLMError": "errors",
    "LifecycleError": "errors",
    "MergeError": "errors",
    "MixError": "errors",
    "PushError": "errors",
    "SecuraError": "errors",
    "ServeError": "errors",
    "StorageError": "errors",
    "TrainingError": "errors",
    "UnservableError": "errors",
    "Adapter": "adapter",
    "AdapterConfig": "adapter",
    "CURModule": "adapter",
    "load_adapter": "adapter:load",
    "load_basis": "adapter",
    "save_adapter": "adapter:save",
    "verify_adapter": "adapter:verify",
    "ResolvedBase": "bases",
    "resolve_base": "bases",
    "Checkpoint": "checkpoint",
    "check_merge": "merge",
    "export_lora": "merge",
    "fold_stream": "merge",
    "open_source": "merge",
    "plan_fold": "merge",
    "plan_merge": "merge",
    "restore_base": "merge",
    "write_merge": "merge",
    "MagNorm": "method",
    "Mode": "method",
    "Parameter": "method",
    "register_mode": "method",
    "register_rule": "method",
    "SecuraConfig": "train",
    "register_method": "train",
    "register_strategy": "train",
    "register_task": "evaluate",
    "register_kernel": "serve.kernels",
}

__all__ = ["__version__", *_EXPORTS]
if not TYPE_CHECKING:  # To a type checker, a name that is not imported above is an error.
    __getattr__ = lazy(__name__, _EXPORTS)


def __dir__() -> list[str]:
    return sorted(__all__)
