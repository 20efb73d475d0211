"""``bounded``: no weight moves by more than the share τ of itself. Ours, not SECURA's."""

from __future__ import annotations

import torch
from torch import Tensor

from secura_serve.method.modes.base import (
    Mode,
    NativeForm,
    Parameter,
    Parameters,
    RhoMax,
    register_mode,
)

__all__ = ["BOUNDED"]


def _apply(W: Tensor, delta: Tensor, parameters: Parameters, rho_max: RhoMax) -> Tensor:
    """Return ``W + τ|W|·(2σ(2Δ/(τ|W|)) − 1)``, which costs a tenth of the equal ``tanh(Δ/(τ|W|))``.

    Where τ|W| is zero or subnormal, W' = W and the gradient is 0; the choice is made before the
    division, because 0·inf in the backward pass would give NaN.
    """
    reach = parameters["tau"] * W.abs()
    tiny = torch.finfo(W.dtype).tiny
    # Choosing costs more than the rest. On other devices, looking first would make them wait.
    if W.device.type == "cpu" and W.numel() and bool(reach.detach().amin() >= tiny):
        return W + reach * (2 * torch.sigmoid(2 * (delta / reach)) - 1)
    live = reach >= tiny
    ratio = torch.where(live, delta, torch.zeros_like(delta)) / torch.where(
        live, reach, torch.ones_like(reach)
    )
    return torch.where(live, W + reach * (2 * torch.sigmoid(2 * ratio) - 1), W)


def _derivative(W: Tensor, delta: Tensor, parameters: Parameters, rho_max: RhoMax) -> Tensor:
    """Return 4σ(1 − σ), σ = σ(2Δ/(τ|W|)); 0 where τ|W| is zero or subnormal."""
    reach = parameters["tau"] * W.abs()
    sigma = (delta / reach).mul_(2).sigmoid_()
    slopes = sigma.mul_((1 - sigma).mul_(4))
    tiny = torch.finfo(W.dtype).tiny
    if W.device.type == "cpu" and W.numel() and bool(reach.amin() >= tiny):
        return slopes
    return torch.where(reach >= tiny, slopes, torch.zeros_like(slopes))


BOUNDED = register_mode(
    Mode(
        "bounded",
        _apply,
        parameters={
            "tau": Parameter(
                0.02, "largest relative change of a weight; smaller keeps more and learns less"
            )
        },
        derivative=_derivative,
        combinable=True,
        native=NativeForm("bounded", ("tau", None)),
    )
)
