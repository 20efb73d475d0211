"""The S-MagNorm modes: one file each, and the registry that holds them.

===========  ====================================================  ===========================
mode         W'                                                    at Δ = 0
===========  ====================================================  ===========================
none         W + Δ                                                 W
published    (2W + Δ) / (2 − σ(s·(ρ/ρ_max − ½)))                   W if ρ_max = 0, else ~1.024·W
bounded      W + τ|W|·(2σ(2Δ / (τ|W|)) − 1)                        W, with slope 1
===========  ====================================================  ===========================

with ρ = |Δ| / (|W| + ε). Derived from the figure of SECURA (arXiv 2502.18168); ``bounded`` is
ours. ``reference`` and ``activation`` act on a layer's output and have no W'.
"""

from __future__ import annotations

# Importing a mode registers it; the order is the one in which error messages list the names.
# isort: off
from secura_serve.method.modes import none, published, bounded, reference, activation

# isort: on
from secura_serve.method.modes.base import (
    Mode,
    NativeForm,
    Parameter,
    foldable_modes,
    get_mode,
    mode_names,
    register_mode,
)

__all__ = [
    "Mode",
    "NativeForm",
    "Parameter",
    "activation",
    "bounded",
    "foldable_modes",
    "get_mode",
    "mode_names",
    "none",
    "published",
    "reference",
    "register_mode",
]
