"""How large an update may be: one that overflows harms more than its own answers.

What an engine computes with it turns to Inf and NaN, and NaN in a shared key-value cache outlives
the request. Weights of LLMs have a root mean square below 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor, linalg

from secura_serve.adapter.store import Adapter
from secura_serve.errors import AdapterFormatError

__all__ = ["LARGEST_RMS", "refuse_oversized", "update_norm_bound", "update_sizes"]

LARGEST_RMS = 100.0
"""Of the entries of ΔW; a useful update has less than a thousandth of it."""


def update_norm_bound(C: Tensor, R: Tensor) -> float:
    """Return ‖C‖·‖R‖/√(out·in), Frobenius norms: ‖U‖ times it bounds the RMS of C·U·R.

    Args:
        C, R: ``(out, r)`` and ``(r, in)``, as W holds them.
    """
    size = math.sqrt(C.shape[0] * R.shape[1])
    return float(linalg.vector_norm(C.float()) * linalg.vector_norm(R.float())) / size


def update_sizes(adapter: Adapter, norm_bounds: Mapping[str, float]) -> dict[str, float]:
    """Return for each module a bound of the root mean square of the entries of C·U·R.

    Args:
        norm_bounds: module -> :func:`update_norm_bound`.
    """
    return {
        # In float64: the square of a float32 may overflow.
        module: float(linalg.vector_norm(cur.U.double())) * norm_bounds[module]
        for module, cur in adapter.modules.items()
    }


def refuse_oversized(adapter: Adapter, norm_bounds: Mapping[str, float]) -> None:
    """Raise AdapterFormatError if an update may exceed :data:`LARGEST_RMS`.

    Only adapters of an additive S-MagNorm mode (``none``) are judged: under the others the size
    of U says nothing about that of W' - W.

    Args:
        norm_bounds: module -> :func:`update_norm_bound`.
    """
    if not adapter.config.magnorm.additive:
        return
    for module, rms in update_sizes(adapter, norm_bounds).items():
        if rms > LARGEST_RMS:
            raise AdapterFormatError(
                f"{adapter.name}: {module}: the entries of C·U·R may reach {rms:.1e} in root mean "
                f"square; more than {LARGEST_RMS:g} would overflow in the engine and is no useful "
                "adapter. Its training has diverged: train it with a lower --lr"
            )
