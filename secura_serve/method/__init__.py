"""Pure functions on tensors: CUR bases, cores and S-MagNorm. Needs torch and NumPy only."""

from __future__ import annotations

from secura_serve.method.coordinates import Coordinates, natural_coordinates
from secura_serve.method.core import INITS, auto_alpha, delta, init_A, merged
from secura_serve.method.cur import Basis, columns, gather, importance, select
from secura_serve.method.fold_stats import FoldStats
from secura_serve.method.magnorm import (
    MagNorm,
    apply,
    apply_to_activations,
    derivative,
    rho_max,
    write,
)
from secura_serve.method.modes import (
    Mode,
    NativeForm,
    Parameter,
    foldable_modes,
    get_mode,
    mode_names,
    register_mode,
)
from secura_serve.method.product import frobenius, product_norm
from secura_serve.method.quantised import dequantise_rows, quantise_rows
from secura_serve.method.ranking import Ranking, rank_by_energy
from secura_serve.method.rules import (
    CALIBRATED,
    get_rule,
    order_indices,
    register_rule,
    rule_names,
    selection_problem,
    uniform_numbers,
)

__all__ = [
    "CALIBRATED",
    "INITS",
    "Basis",
    "Coordinates",
    "FoldStats",
    "MagNorm",
    "Mode",
    "NativeForm",
    "Parameter",
    "Ranking",
    "apply",
    "apply_to_activations",
    "auto_alpha",
    "columns",
    "delta",
    "dequantise_rows",
    "derivative",
    "foldable_modes",
    "frobenius",
    "gather",
    "get_mode",
    "get_rule",
    "importance",
    "init_A",
    "merged",
    "mode_names",
    "natural_coordinates",
    "order_indices",
    "product_norm",
    "quantise_rows",
    "rank_by_energy",
    "register_mode",
    "register_rule",
    "rho_max",
    "rule_names",
    "select",
    "selection_problem",
    "uniform_numbers",
    "write",
]
