"""Pure functions on tensors: CUR bases, cores and S-MagNorm. Needs torch and NumPy only."""

from __future__ import annotations

from secura_serve.method.activation import normed
from secura_serve.method.core import INITS, auto_alpha, delta, init_A, merged
from secura_serve.method.cur import RULES, Basis, columns, gather, importance, select
from secura_serve.method.magnorm import FOLDABLE, MODES, MagNorm, apply, rho_max, write
from secura_serve.method.slope import slope
from secura_serve.method.sums import Sums

__all__ = [
    "FOLDABLE",
    "INITS",
    "MODES",
    "RULES",
    "Basis",
    "MagNorm",
    "Sums",
    "apply",
    "auto_alpha",
    "columns",
    "delta",
    "gather",
    "importance",
    "init_A",
    "merged",
    "normed",
    "rho_max",
    "select",
    "slope",
    "write",
]
