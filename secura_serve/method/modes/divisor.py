"""What ``published``, ``reference`` and ``activation`` share: ρ, and the divisor made of it."""

from __future__ import annotations

import torch
from torch import Tensor

from secura_serve.method.modes.base import Parameter

__all__ = ["PARAMETERS", "change_ratio", "divide", "normalised_divisor"]

PARAMETERS = {
    "scale": Parameter(6.0, "steepness s of the sigmoid"),
    "eps": Parameter(1e-8, "keeps ρ finite where W is 0"),
}


def change_ratio(base: Tensor, delta: Tensor, eps: float) -> Tensor:
    """Return ρ = |Δ| / (|W| + ε), elementwise."""
    return delta.abs() / (base.abs() + eps)


def normalised_divisor(rho: Tensor, rho_max: Tensor, scale: float) -> Tensor:
    """Return ``2 − σ(s·(ρ/ρ_max − ½))``; where ρ_max is 0 the result is not to be used."""
    safe = torch.where(rho_max > 0, rho_max, torch.ones_like(rho_max))
    return 2 - torch.sigmoid(scale * (rho / safe - 0.5))


def divide(base: Tensor, delta: Tensor, res: Tensor, rho_max: Tensor) -> Tensor:
    """Return ``(2W + Δ) / Res``, and W + Δ where ρ_max is 0, as in a fresh adapter.

    That has slope 1: a core that starts at zero must be able to leave it.
    """
    return torch.where(rho_max > 0, (2 * base + delta) / res, base + delta)
