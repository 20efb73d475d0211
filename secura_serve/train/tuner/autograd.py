"""The two forward passes of a CUR adapter, with their derivatives written by hand.

Autograd would keep C, R and whole weights for the backward pass. Here they are gathered again, so
that a layer keeps only ``tokens × r`` numbers (mode ``none``) or its input (the norms on weights),
and W' exists for one layer at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from secura_serve.method import Basis, MagNorm, columns, derivative, gather, write
from secura_serve.method.product import blocks, product

__all__ = ["add_update", "folded_linear"]

Step = TypeVar("Step", bound=Callable[..., Any])


def add_update(
    y: Tensor, core: Tensor, W: Tensor, basis: Basis, bias: Tensor | None, mask: Tensor | None
) -> Tensor:
    """Return ``y + C·U·(m∘(y[rows] − b[rows]))``; R·x costs nothing, it is part of y.

    Args:
        y: ``(..., out)``, the base layer's output.
        core: U ``(r, r)``; gradients flow to it and to y.
        W: ``(out, in)``, pristine.
        mask: dropout's mask m ``(..., r)``, scaled; None drops nothing.
    """
    out: Tensor = _Added.apply(y, core, W, basis, bias, mask)  # type: ignore[no-untyped-call]
    return out


def folded_linear(
    x: Tensor, core: Tensor, W: Tensor, basis: Basis, bias: Tensor | None, norm: MagNorm
) -> Tensor:
    """Return ``W'·x + b`` with W' = S-MagNorm(W, C·U·R), rounded once to x's dtype.

    Args:
        x: ``(..., in)``; gradients flow to it and to ``core`` ``(r, r)``.
        W: ``(out, in)``, pristine.
        norm: of a foldable mode.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    out: Tensor = _Folded.apply(x, core, W, basis, bias, norm)  # type: ignore[no-untyped-call]
    return out


def _without_autocast(step: Step) -> Step:
    """Return ``step`` with autocast off, so that it computes in the dtypes that it names."""

    @wraps(step)
    def run(ctx: Any, first: Tensor, *rest: Any) -> Any:
        with torch.autocast(first.device.type, enabled=False):
            return step(ctx, first, *rest)

    return cast(Step, run)


class _Added(torch.autograd.Function):
    @staticmethod
    @_without_autocast
    def forward(
        ctx: Any,
        y: Tensor,
        core: Tensor,
        W: Tensor,
        basis: Basis,
        bias: Tensor | None,
        mask: Tensor | None,
    ) -> Tensor:
        z = y.index_select(-1, basis.rows)
        if bias is not None:
            z = z - bias[basis.rows].to(z.dtype)
        if mask is not None:
            z = z * mask
        ctx.save_for_backward(z, core, W, *basis, mask)
        wide = torch.promote_types(y.dtype, core.dtype)
        h = z.to(wide).flatten(0, -2) @ core.T.to(wide)
        C = columns(W, basis.cols).to(y.dtype)
        return torch.addmm(y.flatten(0, -2), h.to(y.dtype), C.T).view_as(y)

    @staticmethod
    @once_differentiable
    @_without_autocast
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        z, core, W, rows, cols, mask = ctx.saved_tensors
        wide = torch.promote_types(grad.dtype, core.dtype)
        dh = (grad.flatten(0, -2) @ columns(W, cols).to(grad.dtype)).to(wide)
        dcore = dy = None
        if ctx.needs_input_grad[1]:
            dcore = (dh.T @ z.flatten(0, -2).to(wide)).to(core.dtype)
        if ctx.needs_input_grad[0]:
            dz = (dh @ core.to(wide)).view_as(z).to(grad.dtype)
            dy = grad.index_add(-1, rows, dz if mask is None else dz * mask)
        return dy, dcore, None, None, None, None


class _Folded(torch.autograd.Function):
    @staticmethod
    @_without_autocast
    def forward(
        ctx: Any,
        x: Tensor,
        core: Tensor,
        W: Tensor,
        basis: Basis,
        bias: Tensor | None,
        norm: MagNorm,
    ) -> Tensor:
        ctx.norm, ctx.rho_max = norm, None
        L, R = _factors(W, core, basis)
        if norm.needs_rho_max:
            ctx.rho_max = norm.rho_max_of(W, product(L, R))
        new_W = torch.empty_like(W, dtype=x.dtype)
        write(new_W, W, (L, R), norm, peak=ctx.rho_max)
        ctx.save_for_backward(x, core, W, *basis)
        return F.linear(x, new_W, None if bias is None else bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    @_without_autocast
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, core, W, rows, cols = ctx.saved_tensors
        g, C = grad.flatten(0, -2), columns(W, cols)
        L, R = _factors(W, core, Basis(rows, cols))
        dx = dcore = None
        if ctx.needs_input_grad[0]:
            new_W = torch.empty_like(W, dtype=x.dtype)
            write(new_W, W, (L, R), ctx.norm, peak=ctx.rho_max)
            dx = (g @ new_W).view_as(x)
        if ctx.needs_input_grad[1]:
            # dU = Cᵀ·(derivative ∘ gᵀx)·Rᵀ, a block of rows at a time: no (out, in) in float32.
            dcore = torch.zeros_like(core, dtype=R.dtype)
            inputs, g_T = x.flatten(0, -2), g.T.contiguous()
            for at, delta in blocks(L, R):
                slopes = derivative(W[at].to(delta.dtype), delta, ctx.norm, peak=ctx.rho_max)
                slopes.mul_(g_T[at] @ inputs)
                dcore.addmm_(C[at].T.to(R.dtype), slopes @ R.T)
            dcore = dcore.to(core.dtype)
        return dx, dcore, None, None, None, None


def _factors(W: Tensor, core: Tensor, basis: Basis) -> tuple[Tensor, Tensor]:
    """Return L = C·U and R, so that Δ = L·R, in at least float32."""
    C, R = gather(W, basis)
    wide = torch.promote_types(W.dtype, core.dtype)
    return C.to(wide) @ core.to(wide), R.to(wide)
