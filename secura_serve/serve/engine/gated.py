"""Steps of gate and up that are taken in the activation after them, which reads their output."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from secura_serve.serve import compat
from secura_serve.serve.engine.layers import CURLinearMixin
from secura_serve.serve.kernels import use_base_activation

__all__ = ["take_activations"]


def take_activations(model: nn.Module, modules: Mapping[str, Any]) -> int:
    """Move the steps into activations where kernel and MLP allow it; return how many.

    Args:
        model: vLLM's model.
        modules: its adapter targets by name, with their bases installed.
    """
    taken = 0
    for name, layer in modules.items():
        # Experts, too, have a gate_up_proj; they may be called in parts.
        dense = name.endswith(".mlp.gate_up_proj") and isinstance(layer, CURLinearMixin)
        if not dense or layer.bank is None:
            continue
        mlp = model.get_submodule(name.rpartition(".")[0])
        activation = compat.gated_activation(mlp)
        if activation is not None and layer.can_activate(activation):
            layer.activation = activation
            use_base_activation(activation, compat.take_activation(mlp))
            taken += 1
    return taken
