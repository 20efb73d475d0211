"""Training of CUR adapters: a PEFT tuner, and ``secura-train`` on top of it.

The names below load on first use, and any of them makes PEFT know the method: import one before
``PeftModel.from_pretrained``. The package itself stays instant for ``secura-train --help``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from secura_serve.train.config import SecuraConfig
    from secura_serve.train.layer import SecuraLayer
    from secura_serve.train.linear import SecuraLinear
    from secura_serve.train.model import SecuraModel, adapter_layers
    from secura_serve.train.peft_type import extend_peft_type

__all__ = [
    "SecuraConfig",
    "SecuraLayer",
    "SecuraLinear",
    "SecuraModel",
    "adapter_layers",
    "extend_peft_type",
]


def __getattr__(name: str) -> Any:
    """Load a public name, and with it the registration at the end of ``model.py``.

    Raises:
        AttributeError: ``name`` is not public.
    """
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("secura_serve.train.model"), name)
