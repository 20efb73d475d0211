"""The layer that carries CUR adapters in a model: the forward pass."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from secura_serve.errors import ConfigError
from secura_serve.method import gather
from secura_serve.train.config import SecuraConfig
from secura_serve.train.layer import SecuraLayer

__all__ = ["SecuraLinear"]


class SecuraLinear(nn.Module, SecuraLayer):
    """The layer that stands in for a ``nn.Linear`` or GPT-2's ``Conv1D``."""

    def __init__(self, base_layer: nn.Module, name: str, module: str, config: SecuraConfig) -> None:
        if not isinstance(base_layer, (nn.Linear, Conv1D)):
            raise ConfigError(
                f"{module}: {type(base_layer).__name__} cannot be adapted; allowed: nn.Linear and "
                "Conv1D. Name other target_modules"
            )
        super().__init__()
        SecuraLayer.__init__(self, base_layer, module)
        self._active_adapter = name
        self.update_layer(name, config)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``y + C·(U·y₀[rows])`` with y₀ = W x, so that R costs nothing; W' x under a norm."""
        names, bias = self.applied(), self.base_bias()
        if not names:
            plain: Tensor = self.base_layer(x, *args, **kwargs)
            return plain
        if self.common_norm(names).mode != "none":
            return F.linear(x, self.merged_weight(names).to(x.dtype), bias)
        y: Tensor = self.base_layer(x, *args, **kwargs)
        out = y
        for name in names:
            rows, U = self.secura_rows[name], self.core(name)
            z = y.index_select(-1, rows)
            if bias is not None:
                z = z - bias[rows]
            C, _ = gather(self.pristine, self.basis(name))
            wide = torch.promote_types(y.dtype, U.dtype)
            h = z.to(wide) @ U.T.to(wide)
            out = out + h.to(C.dtype) @ C.T
        return out

    def __repr__(self) -> str:
        return "secura." + super().__repr__()
