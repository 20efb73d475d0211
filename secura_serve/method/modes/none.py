"""``none``: W' = W + Δ, the plain CUR adapter of CURLoRA (arXiv 2408.14572)."""

from __future__ import annotations

import torch
from torch import Tensor

from secura_serve.method.modes.base import Mode, NativeForm, Parameters, RhoMax, register_mode

__all__ = ["NONE"]


def _apply(W: Tensor, delta: Tensor, parameters: Parameters, rho_max: RhoMax) -> Tensor:
    return W + delta


def _derivative(W: Tensor, delta: Tensor, parameters: Parameters, rho_max: RhoMax) -> Tensor:
    return torch.ones_like(delta)


NONE = register_mode(
    Mode(
        "none",
        _apply,
        derivative=_derivative,
        additive=True,
        combinable=True,
        native=NativeForm("none"),
    )
)
