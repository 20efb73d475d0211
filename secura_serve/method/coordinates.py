"""The coordinates that U is trained in: what one unit of it costs of the base.

An update Δ = C·U·R of a linear layer changes its output by Δx, and the loss on text that the base
wrote by itself by about ½·E[(gᵀΔx)²], g being the gradient with respect to the output. That is the
KL from the base to second order, because the gradient's covariance is the Fisher information of a
model's own text. If x and g are taken as independent (K-FAC, arXiv 1503.05671), it is
½·‖Σ_g^½·U·Σ_x^½‖_F² with Σ_x = E[(Rx)(Rx)ᵀ] and Σ_g = E[(Cᵀg)(Cᵀg)ᵀ]. In U = L·Û·P with
L = Σ_g^(−½) and P = Σ_x^(−½) every direction of Û costs the same KL, so equal steps of an optimiser
do, and training learns where the base pays least. (Of earlier tasks rather than of the base's own
text, this is Natural Continual Learning, arXiv 2106.08085.)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from secura_serve.errors import ConfigError

__all__ = ["Coordinates", "natural_coordinates"]

_SMALLEST = 1e-10


class Coordinates(NamedTuple):
    """U = left · Û · right."""

    left: Tensor
    """``(r, r)``, on the side of C."""
    right: Tensor
    """``(r, r)``, on the side of R."""


def natural_coordinates(
    C: Tensor, R: Tensor, gradients: Tensor, inputs: Tensor, damping: float
) -> Coordinates:
    """Return left = a·(Σ_g + ε_g·I)^(−½) and right = b·(Σ_x + ε_x·I)^(−½), float32.

    ε is ``damping`` times the mean of Σ's diagonal: what is quieter than that counts as no quieter,
    because little text says little about it, and rounding would drown it. a and b are such that
    ‖C·left‖_F = ‖C‖_F and ‖right·R‖_F = ‖R‖_F, so that the step scale of ``alpha: "auto"`` means
    what it means without coordinates.

    Args:
        C: ``(out, r)``.
        R: ``(r, in)``.
        gradients, inputs: Σ_g and Σ_x, ``(r, r)``, symmetric; any positive scale.

    Raises:
        ConfigError: a covariance is not finite or zero.
    """
    left, right = _inverse_root(gradients, damping), _inverse_root(inputs, damping)
    C, R = C.to(torch.float64), R.to(torch.float64)
    left = left * (C.norm() / (C @ left).norm())
    right = right * (R.norm() / (right @ R).norm())
    return Coordinates(left.to(torch.float32), right.to(torch.float32))


def _inverse_root(covariance: Tensor, damping: float) -> Tensor:
    """Return (Σ + ε·I)^(−½), symmetric, float64."""
    wide = covariance.to(torch.float64)
    mean = wide.diagonal().mean()
    if not torch.isfinite(wide).all() or mean <= 0:
        raise ConfigError("a covariance of the coordinates is zero or not finite")
    values, vectors = torch.linalg.eigh(wide)
    values = (values + damping * mean).clamp_min(_SMALLEST * mean)
    root: Tensor = (vectors * values.rsqrt()) @ vectors.T
    return root
