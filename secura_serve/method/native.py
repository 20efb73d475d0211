"""A fold in one pass over memory: ``native.c``, compiled at first use.

torch takes up to twenty passes for the same, between cache and registers if not to memory, and
twice as long for a product of two small matrices.
Where there is no C compiler, on other devices and in float64 torch does it, in
:mod:`secura_serve.method.magnorm`; ``SECURA_NATIVE=0`` says so for everything.
"""

from __future__ import annotations

import ctypes
import logging
import os
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secura_serve.compiled import FAILURES, compiled
from secura_serve.method.sums import Sums

__all__ = ["Update", "fits", "product", "write"]

log = logging.getLogger(__name__)

_SOURCE = Path(__file__).with_suffix(".c")
# Nothing here lets the compiler change a result: sums that may be reordered are marked as such.
_FLAGS = (
    *("-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
    *("-fopenmp-simd", "-shared", "-fPIC"),
)
_KINDS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
_MODES = {"none": 0, "published": 1, "bounded": 2, "product": 3}

Update = Tensor | tuple[Tensor, Tensor]
"""Δ ``(out, in)``, or L ``(out, k)`` and R ``(k, in)`` with Δ = L·R."""


def fits(out: Tensor, W: Tensor, update: Update) -> bool:
    """Whether :func:`write` takes these on this machine; else torch has to do it."""
    parts = (update,) if isinstance(update, Tensor) else update
    return (
        all(t.device.type == "cpu" and t.dtype in _KINDS for t in (out, W, *parts))
        and all(t.dtype == torch.float32 for t in parts)
        and _library() is not None
    )


def product(L: Tensor, R: Tensor) -> Tensor:
    """L·R, float32: each number is one sum over k, in order, by fused multiply-adds.

    Those are the bits of the usual BLAS for up to some 200 terms. L and R fit, see :func:`fits`.
    """
    out = torch.empty(L.shape[0], R.shape[1])
    _run_product(out, None, L, R, "product", 0, 0, 0)
    return out


def write(
    out: Tensor, W: Tensor, update: Update, mode: str, a: float, b: float, peak: float
) -> Sums:
    """Put W' = S-MagNorm(W, Δ), computed in float32 and rounded once, into ``out``.

    ``none`` has torch's bits; the other modes may differ from it in the last bits of float32.
    Of a product L·R no more than a few rows exist at a time, with the bits of :func:`product`.

    Args:
        out, W: ``(out, in)``, bfloat16, float16 or float32 each, in any layout.
        update: float32. All of these fit, see :func:`fits`.
        a, b: ``bounded``: τ and nothing; ``published``: scale and ε.
        peak: ρ_max of ``published``.
    """
    library = _library()
    assert library is not None and out.shape == W.shape
    W = W.contiguous()
    new = out if out.is_contiguous() else torch.empty(out.shape, dtype=out.dtype)
    if not isinstance(update, Tensor):
        sums = _run_product(new, W, *update, mode, a, b, peak)
    else:
        assert update.shape == W.shape
        update, sums = update.contiguous(), (ctypes.c_double * 5)()
        library.secura_fold(
            *(new.data_ptr(), _KINDS[new.dtype], W.data_ptr(), _KINDS[W.dtype]),
            *(update.data_ptr(), new.numel(), _MODES[mode], a, b, peak, sums),
        )
    if new is not out:
        out.copy_(new)
    return Sums(*sums)


def _run_product(
    new: Tensor, W: Tensor | None, L: Tensor, R: Tensor, mode: str, a: float, b: float, peak: float
) -> Any:
    """Of contiguous ``new`` and ``W``; without W, ``new`` becomes the product itself."""
    library, sums = _library(), (ctypes.c_double * 5)()
    assert new.shape == (L.shape[0], R.shape[1]) and L.shape[1] == R.shape[0]
    L, R = L.contiguous(), R.contiguous()
    place, kind = (None, 0) if W is None else (W.data_ptr(), _KINDS[W.dtype])
    library.secura_fold_product(
        *(new.data_ptr(), _KINDS[new.dtype], place, kind, L.data_ptr(), R.data_ptr()),
        *(*new.shape, L.shape[1], _MODES[mode], a, b, peak, sums),
    )
    return sums


@cache
def _library() -> Any:
    """``native.c`` as a ctypes library, or None, said once in the log."""
    if os.environ.get("SECURA_NATIVE") == "0":
        return None
    try:
        library = ctypes.CDLL(str(compiled(_SOURCE, _FLAGS, links=("-lm",))))
    except FAILURES as error:
        why = getattr(error, "stderr", None) or error
        log.warning("folding goes through torch and takes longer; native.c is no use: %s", why)
        return None
    place, kind, number = ctypes.c_void_p, ctypes.c_int, ctypes.c_float
    size, rest = ctypes.c_int64, (kind, number, number, number, place)
    library.secura_fold.restype = library.secura_fold_product.restype = None
    library.secura_fold.argtypes = [place, kind, place, kind, place, size, *rest]
    library.secura_fold_product.argtypes = [
        *(place, kind, place, kind, place, place),
        *(size, size, size, *rest),
    ]
    return library
