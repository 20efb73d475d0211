"""The training methods: what of a base is trained, and the base prepared for it.

A method is a :class:`Method` and a call of :func:`register_method`, here or outside the package.
This module imports neither torch nor PEFT, so that ``secura-train --help`` does not wait for them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from secura_serve.lazy import lazy
from secura_serve.train.methods.cur import CURLORA, SECURA
from secura_serve.train.methods.full import FULL
from secura_serve.train.methods.lora import DORA, LORA
from secura_serve.train.methods.registry import METHODS, Method, register_method

if TYPE_CHECKING:
    from secura_serve.train.methods.base import load_base, load_tokenizer
    from secura_serve.train.methods.preparation import prepare
    from secura_serve.train.methods.prepared import PreparedModel
    from secura_serve.train.methods.tensors import (
        checkpoint_tensors,
        restore,
        save_checkpoint_tensors,
    )

__all__ = [
    "METHODS",
    "Method",
    "PreparedModel",
    "checkpoint_tensors",
    "load_base",
    "load_tokenizer",
    "prepare",
    "register_method",
    "restore",
    "save_checkpoint_tensors",
]

register_method("curlora", CURLORA)
register_method("secura", SECURA)
register_method("lora", LORA)
register_method("dora", DORA)
register_method("full", FULL)

__getattr__ = lazy(
    __name__,
    {
        "PreparedModel": "prepared",
        "checkpoint_tensors": "tensors",
        "load_base": "base",
        "load_tokenizer": "base",
        "prepare": "preparation",
        "restore": "tensors",
        "save_checkpoint_tensors": "tensors",
    },
)
