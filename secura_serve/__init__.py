"""Train, merge and serve CUR adapters (CURLoRA, SECURA).

The names below are the public API. They are looked up on first use, so ``import secura_serve``
stays instant and works where torch or vLLM is not installed.
"""

from __future__ import annotations

from secura_serve.lazy import lazy

__version__ = "0.1.0"

# Public name -> the module that defines it. Nothing else has to change to publish a name.
_EXPORTS: dict[str, str] = {
    "AdapterError": "errors",
    "AdapterFormatError": "errors",
    "BaseMismatchError": "errors",
    "BaseModelError": "errors",
    "ConfigError": "errors",
    "DataError": "errors",
    "IncompatibleVLLMError": "errors",
    "MergeError": "errors",
    "SecuraError": "errors",
    "UnservableError": "errors",
    "Adapter": "adapter",
    "AdapterConfig": "adapter",
    "CURModule": "adapter",
    "Checkpoint": "checkpoint",
    "MagNorm": "method",
    "SecuraConfig": "train",
    "ResolvedBase": "bases",
    "resolve_base": "bases",
}

__all__ = ["__version__", *_EXPORTS]
__getattr__ = lazy(__name__, _EXPORTS)


def __dir__() -> list[str]:
    return sorted(__all__)
