"""The update Δ as a product L·R of two thin matrices: whole, by blocks of rows, or its norm."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from secura_serve.method import native

__all__ = ["blocks", "frobenius", "product", "product_norm"]

# Elements per block of rows: its update, in float32, stays in a core's L2 cache.
_BLOCK = 2**18
# Never fewer rows: a matrix product of very few rows takes another path through the BLAS, whose
# sums may end in another last bit than those of the whole matrix.
_ROWS = 16


def product(L: Tensor, R: Tensor) -> Tensor:
    """Return L ``(out, k)`` · R ``(k, in)``; differentiable.

    Where nothing wants a gradient, a float32 product on the CPU has the bits that
    :func:`secura_serve.method.write` folds with.
    """
    trained = torch.is_grad_enabled() and (L.requires_grad or R.requires_grad)
    return L @ R if trained or not native.is_supported(L, L, (L, R)) else native.product(L, R)


def blocks(L: Tensor, R: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield the product by torch, a block of rows at a time; each is valid until the next."""
    step = max(_ROWS, _BLOCK // max(1, R.shape[1]))
    # One for all blocks: a fresh one each time would come as page faults.
    space = torch.empty(min(step, len(L)), R.shape[1], dtype=L.dtype, device=L.device)
    for start in range(0, len(L), step):
        left = L[start : start + step]
        yield slice(start, start + step), torch.mm(left, R, out=space[: len(left)])


def frobenius(W: Tensor) -> float:
    """Return ‖W‖ (Frobenius) of ``(out, in)``, summed in float64 a block of rows at a time."""
    step = max(1, _BLOCK // max(1, W.shape[1]))
    norms = (float(torch.linalg.vector_norm(rows.double())) for rows in W.split(step))
    return math.hypot(*norms)


def product_norm(L: Tensor, R: Tensor) -> float:
    """Return ‖L·R‖ (Frobenius) in float64 without L·R: ‖L·R‖² = tr(LᵀL · R·Rᵀ).

    Costs ``2·k²·(out + in)`` operations. With L = C·U it is tr(Uᵀ(CᵀC)U(RRᵀ)), that of a CUR
    update. What L and R cancel below 1e-8 of ‖L‖·‖R‖ is lost.

    Args:
        L, R: ``(out, k)`` and ``(k, in)``, any floating dtype.
    """
    left, right = L.double(), R.double()
    square = float(((left.T @ left) * (right @ right.T)).sum())
    # Where all of it cancels, rounding may leave less than nothing.
    return math.sqrt(max(square, 0.0)) if square == square else math.nan
