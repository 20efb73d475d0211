"""S-MagNorm on activations: the two modes without a W', kept to reproduce SECURA.

With y the base layer's output, δ the adapter's, and ρ = |δ| / (|y| + ε) elementwise:

==========  ======================================================================
activation  (2y + δ) / (2 − σ(s·(ρ/ρ_max − ½))), ρ_max over the whole tensor y
reference   (2y + δ) / (2 − σ(s·ρ)): the reference code's slip, ρ is not normalised
==========  ======================================================================

``activation`` is SECURA's intent (arXiv 2502.18168): an answer depends on the rest of its batch
and on later tokens. ``reference`` does not tend to y as δ → 0 but to 4y/3. Where all ρ are 0 both
give y, as a fresh adapter must.
"""

from __future__ import annotations

import torch
from torch import Tensor

from secura_serve.errors import ConfigError
from secura_serve.method.magnorm import MagNorm

__all__ = ["normed"]


def normed(y: Tensor, delta: Tensor, norm: MagNorm) -> Tensor:
    """The adapted layer's output; computed in float32 at least, returned in y's dtype.

    The divisor is detached, as in the reference.

    Args:
        y, delta: ``(..., out)``, any floating dtype.
        norm: of mode ``reference`` or ``activation``.

    Raises:
        ConfigError: the mode acts on weights.
    """
    if norm.foldable:
        raise ConfigError(f"magnorm mode {norm.mode!r} acts on weights: use magnorm.apply")
    wide = torch.promote_types(torch.promote_types(y.dtype, delta.dtype), torch.float32)
    base, update = y.to(wide), delta.to(wide)
    rho = update.detach().abs() / (base.detach().abs() + norm.eps)
    top = rho.max() if rho.numel() else rho.sum()
    safe = torch.where(top > 0, top, torch.ones_like(top))
    z = norm.scale * (rho if norm.mode == "reference" else rho / safe - 0.5)
    res = 2 - torch.sigmoid(z)
    # Slope 1 where nothing is added yet: a core that starts at zero must be able to leave it.
    return torch.where(top > 0, (2 * base + update) / res, base + update).to(y.dtype)
