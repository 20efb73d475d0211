"""A LoRA in natural coordinates: is it the coordinates that keep the base, or the CUR subspace?

B = L·B̂ and A = Â·P with the inverse roots L (out, out) and P (in, in) of what the whole layer sees
of the base's own text, see :mod:`secura_serve.method.coordinates`. With that many numbers a layer
this is an experiment and not a method: an adapter's r × r matrices are what makes it cheap.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import set_seed
from transformers.utils import logging as hf_logging

from secura_serve.method import natural_coordinates
from secura_serve.train.basis.energies import read_text
from secura_serve.train.data import encode, read, sample_base_text
from secura_serve.train.loop.fit import fit
from secura_serve.train.methods import PreparedModel, prepare
from secura_serve.train.retention import prepare_retention
from secura_serve.train.run import Run
from secura_serve.train.settings import TrainConfig

__all__ = ["set_lora_coordinates", "train_natural_lora"]


class _Times(nn.Module):
    """left · X · right, one of which is missing."""

    def __init__(self, left: Tensor | None, right: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("left", left, persistent=False)
        self.register_buffer("right", right, persistent=False)

    def forward(self, value: Tensor) -> Tensor:
        value = value if self.left is None else self.left @ value
        return value if self.right is None else value @ self.right


def train_natural_lora(config: TrainConfig, damping: float) -> Run:
    """Train as ``secura-train --method lora`` does, in natural coordinates of A and B."""
    set_seed(config.seed)
    hf_logging.set_verbosity_error()
    prepared = prepare(config)
    rows = encode(read(config.data, columns={}, labels=[]), prepared.tokenizer, config.max_length)
    retention = prepare_retention(prepared)
    layers = set_lora_coordinates(prepared, damping)
    result = fit(prepared, rows, retention=retention)
    for layer in layers:
        for part in (layer.lora_A["default"], layer.lora_B["default"]):
            parametrize.remove_parametrizations(part, "weight", leave_parametrized=True)
    return Run(prepared, {"train_loss": result.train_loss}, result.seconds, result.history)


def set_lora_coordinates(prepared: PreparedModel, damping: float, **sizes: int) -> list[Any]:
    """Give A and B of every layer their coordinates, and return the layers.

    Args:
        sizes: of the text that the base writes: ``sequences``, ``length``.
    """
    layers = [m for m in prepared.model.modules() if hasattr(m, "lora_A")]
    sums = [
        [
            torch.zeros(n, n, device=prepared.model.device)
            for n in (layer.in_features, layer.out_features)
        ]
        for layer in layers
    ]
    base = prepared.model.get_base_model()
    with prepared.model.disable_adapter():
        text = sample_base_text(
            base, prepared.tokenizer, **{"sequences": 64, "length": 96, "seed": 0} | sizes
        )
        handles = [
            layer.base_layer.register_forward_hook(_watcher(parts))
            for layer, parts in zip(layers, sums, strict=True)
        ]
        read_text(base, text, gradients=True)
    for handle in handles:
        handle.remove()
    for layer, parts in zip(layers, sums, strict=True):
        inputs, gradients = (part.cpu() for part in parts)
        left, right = natural_coordinates(
            torch.eye(layer.out_features), torch.eye(layer.in_features), gradients, inputs, damping
        )
        device = layer.base_layer.weight.device
        for part, times in (
            (layer.lora_A["default"], _Times(None, right.to(device))),
            (layer.lora_B["default"], _Times(left.to(device), None)),
        ):
            parametrize.register_parametrization(part, "weight", times, unsafe=True)
    return layers


def _watcher(sums: list[Tensor]) -> Callable[..., None]:
    def after_forward(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        x = inputs[0].detach().flatten(0, -2).float()
        sums[0] += x.T @ x
        output.register_hook(after_backward)

    def after_backward(g: Tensor) -> None:
        flat = g.flatten(0, -2).float()
        sums[1] += flat.T @ flat

    return after_forward
