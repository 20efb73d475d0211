"""``reference``: what SECURA's reference code computes, kept to reproduce its numbers.

y' = (2y + δ) / (2 − σ(s·ρ)): ρ is not normalised there, so that y' tends to 4y/3 and not to y as
δ → 0. Where all ρ are 0 it gives y, as a fresh adapter must.
"""

from __future__ import annotations

import torch
from torch import Tensor

from secura_serve.method.modes.base import Mode, Parameters, RhoMax, register_mode
from secura_serve.method.modes.divisor import PARAMETERS, change_ratio, divide

__all__ = ["REFERENCE"]


def _apply(y: Tensor, delta: Tensor, parameters: Parameters, rho_max: RhoMax) -> Tensor:
    rho = change_ratio(y.detach(), delta.detach(), parameters["eps"])
    top = rho.max() if rho.numel() else rho.sum()
    return divide(y, delta, 2 - torch.sigmoid(parameters["scale"] * rho), top)


REFERENCE = register_mode(Mode("reference", _apply, acts_on="activations", parameters=PARAMETERS))
