"""Train, merge and serve CUR adapters (CURLoRA, SECURA).

The names below are the public API. They are looked up on first use, so ``import secura_serve``
stays instant and works where torch or vLLM is not installed.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# Public name -> the module that defines it. Nothing else has to change to publish a name.
_EXPORTS: dict[str, str] = {
    "AdapterError": "secura_serve.errors",
    "AdapterFormatError": "secura_serve.errors",
    "BaseMismatchError": "secura_serve.errors",
    "BaseModelError": "secura_serve.errors",
    "ConfigError": "secura_serve.errors",
    "DataError": "secura_serve.errors",
    "IncompatibleVLLMError": "secura_serve.errors",
    "MergeError": "secura_serve.errors",
    "SecuraError": "secura_serve.errors",
    "UnservableError": "secura_serve.errors",
    "Adapter": "secura_serve.adapter",
    "AdapterConfig": "secura_serve.adapter",
    "CURModule": "secura_serve.adapter",
    "Checkpoint": "secura_serve.checkpoint",
    "MagNorm": "secura_serve.method",
    "SecuraConfig": "secura_serve.train",
    "ResolvedBase": "secura_serve.bases",
    "resolve_base": "secura_serve.bases",
}

__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str) -> Any:
    """Import the module behind a public name on first use.

    Raises:
        AttributeError: ``name`` is not public.
    """
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
