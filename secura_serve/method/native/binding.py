"""The fold of a weight in one pass over memory: ``fold.c``, compiled at first use.

torch takes up to twenty passes for the same, and twice as long for a product of two thin
matrices. Where there is no C compiler, on other devices, in float64 and in modes without a native
form, torch does it, in :mod:`secura_serve.method.magnorm`; ``SECURA_NATIVE=0`` switches the
native code off everywhere.
"""

from __future__ import annotations

import ctypes
import logging
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secura_serve.method.fold_stats import FoldStats
from secura_serve.system.compiled import FAILURES, HALF_PRECISION, compiled, native_is_wanted

__all__ = ["FORMS", "Update", "is_supported", "product", "write"]

log = logging.getLogger(__name__)

_SOURCE = Path(__file__).with_name("fold.c")
# Nothing here lets the compiler change a result: sums that may be reordered are marked as such.
_FLAGS = (
    *("-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
    *("-fopenmp-simd", "-shared", "-fPIC"),
)
# As in fold.c: enum dtype and enum mode.
_DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
FORMS = {"none": 0, "published": 1, "bounded": 2}
"""The formulas that fold.c has, for :class:`~secura_serve.method.modes.NativeForm`."""
_PRODUCT = 3

Update = Tensor | tuple[Tensor, Tensor]
"""Δ ``(out, in)``, or L ``(out, k)`` and R ``(k, in)`` with Δ = L·R."""


def is_supported(out: Tensor, W: Tensor, update: Update) -> bool:
    """Tell whether :func:`write` takes these on this machine; else torch has to do it."""
    parts = (update,) if isinstance(update, Tensor) else update
    return (
        all(t.device.type == "cpu" and t.dtype in _DTYPES for t in (out, W, *parts))
        and all(t.dtype == torch.float32 for t in parts)
        and _library() is not None
    )


def product(L: Tensor, R: Tensor) -> Tensor:
    """Return L·R, float32: each number is one sum over k, in order, by fused multiply-adds.

    Those are the bits of the usual BLAS for up to some 200 terms. L and R must be supported.
    """
    out = torch.empty(L.shape[0], R.shape[1])
    _run_product(out, None, L, R, _PRODUCT, 0, 0, 0)
    return out


def write(
    out: Tensor, W: Tensor, update: Update, form: str, a: float, b: float, peak: float
) -> FoldStats:
    """Put W' = S-MagNorm(W, Δ), computed in float32 and rounded once, into ``out``.

    ``none`` has torch's bits; the other modes may differ from it in the last bits of float32.
    Of a product L·R no more than a few rows exist at a time, with the bits of :func:`product`.

    Args:
        out, W: ``(out, in)``, bfloat16, float16 or float32 each, in any layout.
        update: float32. :func:`is_supported` must be true of all these.
        form: one of :data:`FORMS`.
        a, b: its arguments, see :class:`~secura_serve.method.modes.NativeForm`.
        peak: ρ_max of the modes that need it.
    """
    library = _library()
    assert library is not None and out.shape == W.shape
    W = W.contiguous()
    new = out if out.is_contiguous() else torch.empty(out.shape, dtype=out.dtype)
    if not isinstance(update, Tensor):
        stats = _run_product(new, W, *update, FORMS[form], a, b, peak)
    else:
        assert update.shape == W.shape
        update, stats = update.contiguous(), (ctypes.c_double * 5)()
        library.secura_fold(
            *(new.data_ptr(), _DTYPES[new.dtype], W.data_ptr(), _DTYPES[W.dtype]),
            *(update.data_ptr(), new.numel(), FORMS[form], a, b, peak, stats),
        )
    if new is not out:
        out.copy_(new)
    return FoldStats(*stats)


def _run_product(
    new: Tensor, W: Tensor | None, L: Tensor, R: Tensor, mode: int, a: float, b: float, peak: float
) -> Any:
    """Fold L·R into contiguous ``W``; without W, ``new`` becomes the product itself."""
    library, stats = _library(), (ctypes.c_double * 5)()
    assert new.shape == (L.shape[0], R.shape[1]) and L.shape[1] == R.shape[0]
    L, R = L.contiguous(), R.contiguous()
    base, dtype = (None, 0) if W is None else (W.data_ptr(), _DTYPES[W.dtype])
    library.secura_fold_product(
        *(new.data_ptr(), _DTYPES[new.dtype], base, dtype, L.data_ptr(), R.data_ptr()),
        *(*new.shape, L.shape[1], mode, a, b, peak, stats),
    )
    return stats


@cache
def _library() -> Any:
    """Return ``fold.c`` as a ctypes library, or None, which is logged once."""
    if not native_is_wanted():
        return None
    try:
        library = ctypes.CDLL(
            str(compiled(_SOURCE, _FLAGS, links=("-lm",), headers=(HALF_PRECISION,)))
        )
    except FAILURES as error:
        why = getattr(error, "stderr", None) or error
        log.warning("folding goes through torch and takes longer; fold.c cannot be used: %s", why)
        return None
    address, code, number = ctypes.c_void_p, ctypes.c_int, ctypes.c_float
    size, rest = ctypes.c_int64, (code, number, number, number, address)
    library.secura_fold.restype = library.secura_fold_product.restype = None
    library.secura_fold.argtypes = [address, code, address, code, address, size, *rest]
    library.secura_fold_product.argtypes = [
        *(address, code, address, code, address, address),
        *(size, size, size, *rest),
    ]
    return library
