"""``published``: S-MagNorm as the figure of SECURA (arXiv 2502.18168) draws it, on weights.

It does not tend to W as Δ → 0: it rescales by 1.024 where ρ is near 0 and by up to 1.91 at ρ_max.
"""

from __future__ import annotations

import torch
from torch import Tensor

from secura_serve.method.modes.base import Mode, NativeForm, Parameters, RhoMax, register_mode
from secura_serve.method.modes.divisor import (
    PARAMETERS,
    change_ratio,
    divide,
    normalised_divisor,
)

__all__ = ["PUBLISHED"]


def _divisor(
    W: Tensor, delta: Tensor, parameters: Parameters, rho_max: RhoMax
) -> tuple[Tensor, Tensor]:
    """Return Res = 2 − σ(s·(ρ/ρ_max − ½)) and ρ_max, by default that of ``delta``."""
    rho = change_ratio(W, delta, parameters["eps"])
    top = torch.as_tensor(rho.max() if rho_max is None else rho_max, dtype=W.dtype, device=W.device)
    return normalised_divisor(rho, top, parameters["scale"]), top


def _apply(W: Tensor, delta: Tensor, parameters: Parameters, rho_max: RhoMax) -> Tensor:
    # Res is detached, as in the reference code.
    res, top = _divisor(W, delta.detach(), parameters, rho_max)
    return divide(W, delta, res, top)


def _derivative(W: Tensor, delta: Tensor, parameters: Parameters, rho_max: RhoMax) -> Tensor:
    res, top = _divisor(W, delta, parameters, rho_max)
    return torch.where(top > 0, res.reciprocal(), torch.ones_like(res))


PUBLISHED = register_mode(
    Mode(
        "published",
        _apply,
        parameters=PARAMETERS,
        derivative=_derivative,
        needs_rho_max=True,
        native=NativeForm("published", ("scale", "eps")),
    )
)
