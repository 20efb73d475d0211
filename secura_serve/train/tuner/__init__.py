"""The PEFT tuner for CUR adapters. Importing it makes PEFT know the method ``SECURA``."""

from __future__ import annotations

from secura_serve.train.tuner.config import SecuraConfig
from secura_serve.train.tuner.export import exported
from secura_serve.train.tuner.layer import SecuraLayer
from secura_serve.train.tuner.linear import SecuraLinear
from secura_serve.train.tuner.model import SecuraModel, adapter_layers
from secura_serve.train.tuner.peft_type import extend_peft_type, register

__all__ = [
    "SecuraConfig",
    "SecuraLayer",
    "SecuraLinear",
    "SecuraModel",
    "adapter_layers",
    "exported",
    "extend_peft_type",
]

register(SecuraConfig, SecuraModel)
