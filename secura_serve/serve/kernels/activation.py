"""The activations of gated MLPs, act(gate)·up, that a kernel can take along with its step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["ACTIVATIONS", "base_activation", "gated", "use_base_activation"]

ACTIVATIONS = ("silu", "gelu_tanh")
"""SiLU, x·σ(x), and GELU in its form with tanh, which is x·σ(√(8/π)·(x + 0.044715·x³))."""

_OWN: dict[str, Callable[[Tensor], Tensor]] = {}


def gated(y: Tensor, activation: str) -> Tensor:
    """Return act(gate)·up as a plain tensor expression.

    Args:
        y: ``(T, 2·d)``, gate and up side by side.
        activation: one of :data:`ACTIVATIONS`.

    Returns:
        ``(T, d)``.
    """
    gate, up = y.chunk(2, dim=-1)
    if activation == "silu":
        return torch.nn.functional.silu(gate) * up
    return torch.nn.functional.gelu(gate, approximate="tanh") * up


def use_base_activation(activation: str, call: Callable[[Tensor], Tensor]) -> None:
    """Have batches without adapters take the base's own module instead of :func:`gated`."""
    _OWN[activation] = call


def base_activation(y: Tensor, activation: str) -> Tensor:
    """Return what the base makes of ``y``; see :func:`gated`."""
    own = _OWN.get(activation)
    return gated(y, activation) if own is None else own(y)
