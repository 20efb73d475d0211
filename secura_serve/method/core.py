"""The trained core of an adapter: U, or its factors A·B, and the update that it makes.

Δ = W[:, cols] · U · W[rows, :], shapes (out, r) · (r, r) · (r, in). CURLoRA (arXiv 2408.14572)
trains U; SECURA's CABR (arXiv 2502.18168) trains A (r, m) and B (m, r) with U = A·B. There
m >= r; with m < r the update has rank m, as a LoRA confined to the span of C and R.
"""

from __future__ import annotations

import torch
from torch import Tensor

from secura_serve.errors import ConfigError
from secura_serve.method.cur import Basis, gather
from secura_serve.method.magnorm import MagNorm, apply
from secura_serve.method.product import product

__all__ = ["INITS", "auto_alpha", "delta", "init_A", "merged"]

INITS = ("block", "svd")


def auto_alpha(W: Tensor, basis: Basis) -> float:
    """Return ``0.1·sqrt(out·in) / (‖C‖_F·‖R‖_F)``: the step scale of ``alpha: "auto"``.

    ‖C‖‖R‖ differs by orders of magnitude between modules; with this scale one learning rate
    fits them all. The value ends up inside the stored U.
    """
    C, R = gather(W, basis)
    norms = C.to(torch.float64).norm() * R.to(torch.float64).norm()
    return float(0.1 * (W.shape[0] * W.shape[1]) ** 0.5 / norms)


def init_A(W: Tensor, r: int, m: int, init: str = "block") -> Tensor:
    """Return CABR's start for A, ``(r, m)`` float32, with spectral norm 1. B starts at zero.

    ``block`` is ``W[:r, :m]``, which is what the reference's ``U[:r]·S·V[:m]ᵀ`` comes to.
    ``svd`` is ``W[:r]·V_m = U[:r, :m]·diag(S_m)``: the same rows in W's m leading right singular
    directions. Entries beyond W's shape are 0.

    Raises:
        ConfigError: m < 1, or an unknown ``init``.
    """
    if m < 1:
        raise ConfigError(f"inner rank m={m} must be at least 1")
    if init not in INITS:
        raise ConfigError(f"unknown init {init!r}; allowed: {', '.join(INITS)}")
    A = torch.zeros(r, m, dtype=torch.float32, device=W.device)
    source = W.detach().to(torch.float32)
    if init == "block":
        block = source[:r, :m]
    else:  # svd
        left, singular, _ = torch.linalg.svd(source, full_matrices=False)
        block = left[:r, :m] * singular[:m]
    A[: block.shape[0], : block.shape[1]] = block
    norm: Tensor = torch.linalg.matrix_norm(A, ord=2)
    if norm == 0:
        raise ConfigError(f"A would start at zero: W[:{r}, :{m}] is all zero; use init='svd'")
    return A / norm


def delta(W: Tensor, basis: Basis, U: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return ``Δ = C·U·R`` of shape ``(out, in)``, computed in ``dtype``. Differentiable in U."""
    C, R = gather(W, basis)
    return product(C.to(dtype) @ U.to(W.device, dtype), R.to(dtype))


def merged(
    W: Tensor,
    basis: Basis,
    U: Tensor,
    norm: MagNorm,
    *,
    peak: Tensor | float | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return W' = S-MagNorm(W, C·U·R), ``(out, in)`` in ``dtype``; the caller rounds once."""
    return apply(W.to(dtype), delta(W, basis, U, dtype=dtype), norm, peak=peak)
