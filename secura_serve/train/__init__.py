"""Training of CUR adapters: a PEFT tuner, and ``secura-train`` on top of it.

Importing this package registers the method with PEFT, so that ``get_peft_model`` and
``PeftModel.from_pretrained`` know ``SecuraConfig``.
"""

from __future__ import annotations

from secura_serve.train.config import SecuraConfig
from secura_serve.train.layer import SecuraLayer
from secura_serve.train.linear import SecuraLinear
from secura_serve.train.model import SecuraModel, adapter_layers
from secura_serve.train.peft_type import extend_peft_type, register

__all__ = [
    "SecuraConfig",
    "SecuraLayer",
    "SecuraLinear",
    "SecuraModel",
    "adapter_layers",
    "extend_peft_type",
]

register(SecuraConfig, SecuraModel)
