"""What rows and columns see of the base's own text: second moments of R·x and of Cᵀ·g."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secura_serve.method import columns
from secura_serve.train.basis.energies import read_text
from secura_serve.train.data.base_text import BaseText
from secura_serve.train.tuner import SecuraLayer

__all__ = ["Moments", "measure_moments"]


@dataclass
class Moments:
    """Sums over all tokens for one layer, float64 on the CPU."""

    inputs: Tensor
    """Σ (Rx)(Rx)ᵀ, ``(r, r)``, before the bias."""
    gradients: Tensor
    """Σ (Cᵀg)(Cᵀg)ᵀ, ``(r, r)``; g is the gradient with respect to the layer's output."""


def measure_moments(
    model: Any, text: BaseText, layers: Mapping[str, SecuraLayer], name: str
) -> dict[str, Moments]:
    """Run the base forward and backward over ``text``; every position counts.

    The text is drawn from the base's own distribution, so the moments of g are the Fisher
    information of the layer's output.

    Args:
        model: the causal language model whose layers are ``layers``, with adapter ``name``
            disabled or Δ = 0.
    """
    ranks = {module: layer.basis(name).r for module, layer in layers.items()}
    sums = {
        module: Moments(*(torch.zeros(r, r, dtype=torch.float64) for _ in range(2)))
        for module, r in ranks.items()
    }
    with _watched(layers, sums, name):
        read_text(model, text, gradients=True)
    return sums


@contextmanager
def _watched(
    layers: Mapping[str, SecuraLayer], sums: Mapping[str, Moments], name: str
) -> Iterator[None]:
    """Add up the moments of ``layers`` inside the block."""
    handles = [
        layer.get_base_layer().register_forward_hook(_watcher(layer, sums[module], name))
        for module, layer in layers.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _watcher(layer: SecuraLayer, sums: Moments, name: str) -> Any:
    basis, W = layer.basis(name), layer.pristine
    wide = torch.promote_types(W.dtype, torch.float32)
    C = columns(W, basis.cols).to(wide)

    def after_forward(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if layer.base_bias() is None:
            z = output.detach()[..., basis.rows]
        else:
            # Not y − b: a large bias would leave nothing but its rounding.
            z = F.linear(inputs[0].detach().to(wide), W[basis.rows].to(wide))
        sums.inputs += _moments(z.to(wide))
        output.register_hook(after_backward)

    def after_backward(g: Tensor) -> None:
        sums.gradients += _moments(g.to(wide) @ C)

    return after_forward


def _moments(values: Tensor) -> Tensor:
    """Return Σ v·vᵀ over all but the last dimension, float64, on the CPU."""
    flat = values.flatten(0, -2)
    return (flat.T @ flat).to("cpu", torch.float64)
