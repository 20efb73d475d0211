"""Proves the hand-written derivatives of the adapter layer: gradcheck in float64, and equality
with autograd through the plain formula in float32 and bfloat16. Needs peft and transformers.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from secura_serve.method import Basis, MagNorm, apply, columns, delta, derivative
from secura_serve.train.tuner.autograd import add_update, folded_linear

OUT, IN, R = 11, 9, 3
NORMS = (MagNorm("bounded", tau=0.3), MagNorm("published"), MagNorm())
# The second row and column stand twice, as where two adapters add up.
BASIS = Basis(torch.tensor([4, 0, 0]), torch.tensor([8, 2, 2]))


def case(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((OUT, IN), (R, R), (2, 4, IN), (OUT,))
    W, U, x, bias = (torch.randn(s, generator=generator, dtype=dtype) for s in shapes)
    return W, (0.3 * U).requires_grad_(), x.requires_grad_(), bias


def plain_added(y: Tensor, U: Tensor, W: Tensor, bias: Any, kept: Any) -> Tensor:
    z = y[..., BASIS.rows] - (0 if bias is None else bias[BASIS.rows])
    return y + (z if kept is None else z * kept) @ U.T @ columns(W, BASIS.cols).T


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_added(biased: bool, masked: bool) -> None:
    W, U, x, bias = case()
    b = bias if biased else None
    kept = torch.tensor([2.0, 0.0, 1.0], dtype=W.dtype).expand(2, 4, R) if masked else None
    y = F.linear(x, W, b).detach().requires_grad_()

    def run(y: Tensor, U: Tensor) -> Tensor:
        return add_update(y, U, W, BASIS, b, kept)

    torch.testing.assert_close(run(y, U), plain_added(y, U, W, b, kept))
    assert torch.autograd.gradcheck(run, (y, U))


@pytest.mark.parametrize("norm", NORMS, ids=lambda n: n.mode)
@pytest.mark.parametrize("turned", [False, True])
def test_folded(norm: MagNorm, turned: bool) -> None:
    W, U, x, bias = case()
    W = W.T.contiguous().T if turned else W
    plain = F.linear(x, apply(W, delta(W, BASIS, U, dtype=W.dtype), norm), bias)
    found = folded_linear(x, U, W, BASIS, bias, norm)
    torch.testing.assert_close(found, plain)
    wanted = torch.autograd.grad(plain.square().sum(), (U, x))
    torch.testing.assert_close(torch.autograd.grad(found.square().sum(), (U, x)), wanted)
    if norm.mode != "published":  # whose divisor is a constant to it, and not to gradcheck
        assert torch.autograd.gradcheck(
            lambda x, U: folded_linear(x, U, W, BASIS, bias, norm), (x, U)
        )


@pytest.mark.parametrize("norm", NORMS, ids=lambda n: n.mode)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bfloat16_base_keeps_a_float32_core(norm: MagNorm, dtype: torch.dtype) -> None:
    W, U, x, bias = (t.detach() for t in case())
    low = [t.to(dtype).requires_grad_() for t in (W, x, bias)]
    core = U.float().requires_grad_()
    if norm.mode == "none":
        found = add_update(
            F.linear(low[1], low[0], low[2]), core, low[0].detach(), BASIS, low[2], None
        )
    else:
        found = folded_linear(low[1], core, low[0].detach(), BASIS, low[2].detach(), norm)
    got = torch.autograd.grad(found.float().square().sum(), (core, low[1]))
    assert found.dtype == got[1].dtype == dtype and got[0].dtype == torch.float32

    W64, x64, b64 = (t.detach().double() for t in low)
    U64, x64 = core.detach().double().requires_grad_(), x64.requires_grad_()
    plain = F.linear(x64, apply(W64, delta(W64, BASIS, U64, dtype=torch.float64), norm), b64)
    want = torch.autograd.grad(plain.square().sum(), (U64, x64))
    close = 1e-4 if dtype == torch.float32 else 0.04
    for a, b in zip(got, want, strict=True):
        assert (a.double() - b).norm() <= close * b.norm()


@pytest.mark.parametrize("norm", NORMS, ids=lambda n: n.mode)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_slope_is_the_derivative(norm: MagNorm, dtype: torch.dtype) -> None:
    W, U, _, _ = case(dtype)
    W[0, :3] = torch.tensor([0.0, 1e-40, -0.0])
    point = delta(W, BASIS, U, dtype=dtype).detach().requires_grad_()
    (want,) = torch.autograd.grad(apply(W, point, norm, peak=2.0).sum(), point)
    found = derivative(W, point, norm, peak=2.0)
    torch.testing.assert_close(found, want)
    assert torch.isfinite(found).all()
