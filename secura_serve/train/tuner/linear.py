"""``SecuraLinear``: a linear layer with CUR adapters, and its forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from secura_serve.errors import ConfigError
from secura_serve.method import apply_to_activations, columns
from secura_serve.train.tuner.autograd import add_update, folded_linear
from secura_serve.train.tuner.config import SecuraConfig
from secura_serve.train.tuner.layer import SecuraLayer

__all__ = ["SecuraLinear"]


class SecuraLinear(nn.Module, SecuraLayer):
    """Replaces a ``nn.Linear`` or GPT-2's ``Conv1D`` in a model."""

    def __init__(self, base_layer: nn.Module, name: str, module: str, config: SecuraConfig) -> None:
        _check_dense(base_layer, module)
        super().__init__()
        SecuraLayer.__init__(self, base_layer, module)
        self._active_adapter = name
        self.update_layer(name, config)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return ``y + C·(U·y[rows])``, where y = W·x holds R·x already; W'·x under a norm."""
        names, bias = self.applied(), self.base_bias()
        if not names:
            plain: Tensor = self.base_layer(x, *args, **kwargs)
            return plain
        norm, (basis, core) = self.common_norm(names), self.total(names)
        if norm.foldable and not norm.additive:
            return folded_linear(x, core, self.pristine, basis, bias, norm)
        y: Tensor = self.base_layer(x, *args, **kwargs)
        if norm.additive:
            return add_update(y, core, self.pristine, basis, bias, self._dropout(names, y))
        # Reproduction only, so by autograd alone.
        C = columns(self.pristine, basis.cols)
        z = y[..., basis.rows] if bias is None else y[..., basis.rows] - bias[basis.rows]
        wide = torch.promote_types(y.dtype, core.dtype)
        return apply_to_activations(y, z.to(wide) @ core.T.to(wide) @ C.T.to(wide), norm)

    def _dropout(self, names: Sequence[str], y: Tensor) -> Tensor | None:
        """Return the mask for R·x, each adapter's part at its own rate; None if all rates are 0."""
        rates = [self.secura_dropout[n] for n in names]
        if not self.training or not any(rates):
            return None
        ranks = [len(self.secura_rows[n]) for n in names]
        ones = [y.new_ones(*y.shape[:-1], rank) for rank in ranks]
        return torch.cat([F.dropout(o, p) for o, p in zip(ones, rates, strict=True)], -1)

    def __repr__(self) -> str:
        return "secura." + super().__repr__()


_DENSE = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def _check_dense(layer: nn.Module, module: str) -> None:
    """Raise for a layer without a dense W, such as a quantised one (which may be a ``nn.Linear``).

    Raises:
        ConfigError: the layer holds no dense W, or is neither ``nn.Linear`` nor ``Conv1D``.
    """
    class_name = type(layer).__name__
    stored = [*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)]
    packed = [
        f"{name} is a {type(value).__name__} of {value.dtype}"
        for name, value in stored
        if value.dtype not in _DENSE or type(value) not in (nn.Parameter, Tensor)
    ]
    if packed:
        raise ConfigError(
            f"{module}: {class_name} holds no dense W ({packed[0]}). C and R are columns and rows "
            "of the dense W, so a quantised or sharded layer cannot be adapted. Train on the base "
            "in bfloat16 or float32: load it without quantization_config, or call "
            "model.dequantize(), whose weights are then the base that the adapter belongs to"
        )
    if not isinstance(layer, (nn.Linear, Conv1D)):
        raise ConfigError(
            f"{module}: {class_name} cannot be adapted; allowed: nn.Linear and "
            "Conv1D. Name other target_modules"
        )
