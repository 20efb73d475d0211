"""``activation``: SECURA's S-MagNorm on a layer's output, kept to reproduce the paper.

With y the base layer's output, δ the adapter's and ρ = |δ| / (|y| + ε),
y' = (2y + δ) / (2 − σ(s·(ρ/ρ_max − ½))), ρ_max over the whole tensor y (arXiv 2502.18168). An
answer therefore depends on the rest of its batch and on later tokens.
"""

from __future__ import annotations

from torch import Tensor

from secura_serve.method.modes.base import Mode, Parameters, RhoMax, register_mode
from secura_serve.method.modes.divisor import PARAMETERS, change_ratio, divide, normalised_divisor

__all__ = ["ACTIVATION"]


def _apply(y: Tensor, delta: Tensor, parameters: Parameters, rho_max: RhoMax) -> Tensor:
    # The divisor is detached, as in the reference code.
    rho = change_ratio(y.detach(), delta.detach(), parameters["eps"])
    top = rho.max() if rho.numel() else rho.sum()
    return divide(y, delta, normalised_divisor(rho, top, parameters["scale"]), top)


ACTIVATION = register_mode(Mode("activation", _apply, acts_on="activations", parameters=PARAMETERS))
