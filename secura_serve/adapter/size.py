"""How large an update may be: one that overflows harms more than its own answers.

What an engine computes with it turns to Inf and NaN, and NaN in a shared key-value cache outlives
the request. Weights of LLMs have a root mean square below 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

from torch import linalg

from secura_serve.adapter.store import Adapter, WeightSource
from secura_serve.errors import AdapterFormatError
from secura_serve.method import gather

__all__ = ["LARGEST_RMS", "gains", "refuse_oversized"]

LARGEST_RMS = 100.0
"""Of the entries of ΔW; a useful update has less than a thousandth of it."""


def gains(adapter: Adapter, base: WeightSource) -> dict[str, float]:
    """Module -> ‖C‖·‖R‖/√(out·in), Frobenius norms: ‖U‖ times it bounds the RMS of C·U·R."""
    found = {}
    for module, cur in adapter.modules.items():
        C, R = (part.float() for part in gather(base.weight(module), cur.basis))
        size = prod(base.shape(module)) ** 0.5
        found[module] = float(linalg.vector_norm(C) * linalg.vector_norm(R)) / size
    return found


def refuse_oversized(adapter: Adapter, gains: Mapping[str, float]) -> None:
    """Raise AdapterFormatError if an update may exceed :data:`LARGEST_RMS`.

    With S-MagNorm the size of U says nothing about that of W' - W, so that only ``none`` is judged.
    """
    if adapter.config.magnorm.mode != "none":
        return
    for module, cur in adapter.modules.items():
        # In float64: the square of a float32 may overflow.
        rms = float(linalg.vector_norm(cur.U.double())) * gains[module]
        if rms > LARGEST_RMS:
            raise AdapterFormatError(
                f"{adapter.name}: {module}: the entries of C·U·R may reach {rms:.1e} in root mean "
                f"square; more than {LARGEST_RMS:g} would overflow in the engine and is no useful "
                "adapter. Its training has diverged: train it with a lower --lr"
            )
