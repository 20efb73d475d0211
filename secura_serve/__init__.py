"""Train, merge and serve CUR adapters (CURLoRA, SECURA).

The names below are the public API. They are looked up on first use, so ``import secura_serve``
stays instant and works where torch or vLLM is not installed.
"""

from __future__ import annotations

from secura_serve.lazy import lazy

__version__ = "0.1.0"

# Public name -> the module that defines it, and its name there where that is another. Nothing
# else has to change to publish a name, but for the list in tests/package/test_public.py.
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
__getattr__ = lazy(__name__, _EXPORTS)


def __dir__() -> list[str]:
    return sorted(__all__)
