"""Proves the mathematics against oracles written as plain float64 loops: Δ, every S-MagNorm
mode, selection; derivatives by gradcheck; the bound of ``bounded``; no NaN where W is 0.

Needs torch and NumPy only.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from secura_serve.errors import ConfigError
from secura_serve.method import (
    Basis,
    MagNorm,
    apply,
    auto_alpha,
    delta,
    frobenius,
    gather,
    importance,
    init_A,
    merged,
    product_norm,
    select,
)

OUT, IN, R = 7, 5, 3
PINNED = ([0, 1, 6, 3], [5, 0, 4, 3])


@pytest.fixture
def W() -> Tensor:
    return torch.randn(OUT, IN, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture
def basis() -> Basis:
    return Basis(rows=torch.tensor([4, 0, 6]), cols=torch.tensor([2, 3, 0]))


@pytest.fixture
def U() -> Tensor:
    return torch.randn(R, R, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def loop_delta(W: Tensor, basis: Basis, U: Tensor) -> Tensor:
    w, u = W.tolist(), U.tolist()
    rows, cols = basis.rows.tolist(), basis.cols.tolist()
    return torch.tensor(
        [
            [
                sum(w[i][cols[a]] * u[a][b] * w[rows[b]][j] for a in range(R) for b in range(R))
                for j in range(IN)
            ]
            for i in range(OUT)
        ],
        dtype=torch.float64,
    )


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def loop_norm(W: Tensor, D: Tensor, norm: MagNorm) -> Tensor:
    pairs = [list(zip(w, d, strict=True)) for w, d in zip(W.tolist(), D.tolist(), strict=True)]
    if norm.mode == "bounded":

        def one(w: float, d: float) -> float:
            reach = norm.tau * abs(w)
            return w + reach * (2 * sigmoid(2 * d / reach) - 1) if reach else w
    else:
        peak = max(abs(d) / (abs(w) + norm.eps) for row in pairs for w, d in row)

        def one(w: float, d: float) -> float:
            rho = abs(d) / (abs(w) + norm.eps)
            res = 2 - sigmoid(norm.scale * (rho / peak - 0.5))
            return (2 * w + d) / res

    return torch.tensor([[one(w, d) for w, d in row] for row in pairs], dtype=torch.float64)


def test_norms_are_those_of_the_dense_matrices(W: Tensor, basis: Basis, U: Tensor) -> None:
    C, R_ = gather(W, basis)
    dense = math.sqrt(sum(x * x for row in loop_delta(W, basis, U).tolist() for x in row))
    assert product_norm(C @ U, R_) == pytest.approx(dense, rel=1e-12)
    assert product_norm(C @ U * 0, R_) == 0
    wide = torch.randn(900, 700, generator=torch.Generator().manual_seed(2)).bfloat16()
    exact = math.sqrt(math.fsum(x * x for x in wide.double().flatten().tolist()))
    assert frobenius(wide) == pytest.approx(exact, rel=1e-12)  # More than one block of rows.


def test_delta_is_the_triple_sum(W: Tensor, basis: Basis, U: Tensor) -> None:
    found = delta(W, basis, U, dtype=torch.float64)
    torch.testing.assert_close(found, loop_delta(W, basis, U), rtol=1e-12, atol=1e-12)
    C, R_ = gather(W, basis)
    assert C.shape == (OUT, R) and R_.shape == (R, IN)


def test_r_is_a_free_gather_of_the_output(W: Tensor, basis: Basis, U: Tensor) -> None:
    x = torch.randn(4, IN, dtype=torch.float64)
    y = x @ W.T
    gathered = y + (y[:, basis.rows] @ U.T) @ W[:, basis.cols].T
    torch.testing.assert_close(gathered, x @ (W + loop_delta(W, basis, U)).T)


@pytest.mark.parametrize("norm", [MagNorm("bounded", tau=0.3), MagNorm("published")], ids=str)
def test_norms_follow_the_formula(W: Tensor, basis: Basis, U: Tensor, norm: MagNorm) -> None:
    D = loop_delta(W, basis, U)
    wanted = loop_norm(W, D, norm)
    torch.testing.assert_close(apply(W, D, norm), wanted, rtol=1e-12, atol=1e-12)
    whole = merged(W, basis, U, norm, dtype=torch.float64)
    torch.testing.assert_close(whole, wanted, rtol=1e-11, atol=1e-11)


def test_no_norm_adds(W: Tensor) -> None:
    D = torch.randn_like(W)
    assert torch.equal(apply(W, D, MagNorm()), W + D)


@pytest.mark.parametrize("mode", ["reference", "activation"])
def test_activation_modes_have_no_weight(W: Tensor, mode: str) -> None:
    with pytest.raises(ConfigError, match="acts on activations"):
        apply(W, W, MagNorm(mode))


def test_gradcheck_bounded_and_none(W: Tensor, basis: Basis, U: Tensor) -> None:
    for norm in (MagNorm(), MagNorm("bounded", tau=0.5)):
        run: Callable[[Tensor], Tensor] = lambda u, n=norm: merged(  # noqa: E731
            W, basis, u, n, dtype=torch.float64
        )
        assert torch.autograd.gradcheck(run, (0.1 * U).requires_grad_())


def test_gradient_of_published_treats_res_as_a_constant(W: Tensor) -> None:
    D = torch.randn_like(W).requires_grad_()
    norm = MagNorm("published")
    apply(W, D, norm).sum().backward()
    # With Res constant, dW'/dΔ = 1/Res = W' / (2W + Δ).
    wanted = loop_norm(W, D.detach(), norm) / (2 * W + D.detach())
    assert D.grad is not None
    torch.testing.assert_close(D.grad, wanted)


@pytest.mark.parametrize("tau", [0.001, 0.02, 0.3])
def test_bounded_never_leaves_its_reach(tau: float) -> None:
    generator = torch.Generator().manual_seed(3)
    W = torch.randn(64, 64, generator=generator)
    for size in (1e-6, 1.0, 1e6):
        D = size * torch.randn(64, 64, generator=generator)
        moved = (apply(W, D, MagNorm("bounded", tau=tau)) - W).abs()
        # Half an ulp of W is what one rounding to float32 may add.
        assert (moved <= tau * W.abs() + torch.finfo(W.dtype).eps * W.abs()).all()


def test_bounded_has_slope_one_at_zero(W: Tensor) -> None:
    D = torch.zeros_like(W).requires_grad_()
    new = apply(W, D, MagNorm("bounded"))
    new.sum().backward()
    assert torch.equal(new.detach(), W) and D.grad is not None
    torch.testing.assert_close(D.grad, torch.ones_like(W))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mode", ["none", "bounded", "published"])
def test_no_nan_where_the_weight_is_zero_or_tiny(mode: str, dtype: torch.dtype) -> None:
    tiny = torch.finfo(dtype).tiny
    W = torch.tensor([[0.0, tiny, -tiny / 2], [1.0, 0.0, -1e-30]], dtype=dtype)
    D = torch.tensor([[1.0, -1.0, 1.0], [0.5, 0.0, 3.0]], dtype=dtype, requires_grad=True)
    new = apply(W, D, MagNorm(mode))
    new.sum().backward()
    assert D.grad is not None
    assert torch.isfinite(new).all() and torch.isfinite(D.grad).all()
    if mode == "bounded":
        assert new[0, 0] == 0 and D.grad[0, 0] == 0


def test_published_without_update_is_the_base(W: Tensor) -> None:
    assert torch.equal(apply(W, torch.zeros_like(W), MagNorm("published")), W)


@pytest.mark.parametrize("bad", [{"tau": 0}, {"tau": math.nan}, {"scale": -1}, {"eps": True}])
def test_norm_refuses_bad_numbers(bad: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="finite number > 0"):
        MagNorm("bounded", **bad)


def test_norm_json_round_trip() -> None:
    for norm in (MagNorm(), MagNorm("bounded", tau=0.1), MagNorm("published", scale=5)):
        assert MagNorm.from_json(norm.to_json()) == norm
    with pytest.raises(ConfigError, match="allows tau"):
        MagNorm.from_json({"mode": "bounded", "taux": 1})


def test_importance_is_the_relative_squared_norm(W: Tensor) -> None:
    squares = W.numpy() ** 2
    np.testing.assert_allclose(importance(W, "row"), squares.sum(1) / squares.sum(), rtol=1e-6)
    np.testing.assert_allclose(importance(W, "col"), squares.sum(0) / squares.sum(), rtol=1e-6)
    with pytest.raises(ConfigError, match="unknown axis 'rows'; allowed: row, col"):
        importance(W, "rows")


def test_selection_is_nested_and_the_same_in_every_dtype() -> None:
    W = torch.randn(40, 30, generator=torch.Generator().manual_seed(5)).to(torch.bfloat16)
    whole = select(W, 30, module="m")
    assert sorted(whole.cols.tolist()) == list(range(30))
    for r in (1, 8, 29):
        for other in (W, W.float(), W.double()):
            part = select(other, r, module="m")
            assert torch.equal(part.rows, whole.rows[:r]) and torch.equal(part.cols, whole.cols[:r])
    assert not torch.equal(select(W, 8, module="m", seed=1).rows, whole.rows[:8])
    assert not torch.equal(select(W, 8, module="n").rows, whole.rows[:8])


def test_selection_is_pinned() -> None:
    """A change here would part new adapters from the basis that the old ones share."""
    W = torch.arange(1, 49, dtype=torch.float32).reshape(8, 6)
    found = select(W, 4, module="model.layers.0.self_attn.q_proj")
    assert (found.rows.tolist(), found.cols.tolist()) == PINNED


def test_lowest_norm_takes_the_smallest_ties_by_index() -> None:
    W = torch.diag(torch.tensor([3.0, 1.0, 2.0, 1.0]))
    found = select(W, 3, module="m", rule="lowest_norm")
    assert found.rows.tolist() == [1, 3, 2] and found.cols.tolist() == [1, 3, 2]


@pytest.mark.parametrize("rule", ["inverse_sampled", "lowest_norm"])
def test_zero_rows_come_last_and_are_never_used(rule: str) -> None:
    W = torch.randn(6, 6, generator=torch.Generator().manual_seed(2))
    W[[0, 3]] = 0
    assert not {0, 3} & set(select(W, 4, module="m", rule=rule).rows.tolist())
    with pytest.raises(ConfigError, match="4 non-zero rows"):
        select(W, 5, module="m", rule=rule)


def test_inverse_sampling_draws_by_inverse_norm() -> None:
    """The first column over 3000 seeds follows p̃ ∝ 1/p within five standard deviations."""
    W = torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64).sqrt())
    n = 3000
    firsts = [int(select(W, 1, module="m", seed=s).cols[0]) for s in range(n)]
    weights = 1 / np.array([1.0, 2.0, 3.0, 4.0])
    wanted = weights / weights.sum()
    counts = np.bincount(firsts, minlength=4) / n
    assert (np.abs(counts - wanted) < 5 * np.sqrt(wanted * (1 - wanted) / n)).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [({"rule": "best"}, "unknown selection rule"), ({"r": 0}, "rank 0"), ({"r": 6}, "rank 6")],
)
def test_selection_refuses(W: Tensor, change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        select(W, **({"r": 2, "module": "m"} | change))  # type: ignore[arg-type]


def test_auto_alpha(W: Tensor, basis: Basis) -> None:
    C, R_ = gather(W, basis)
    wanted = 0.1 * math.sqrt(OUT * IN) / (np.linalg.norm(C) * np.linalg.norm(R_))
    assert auto_alpha(W, basis) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("init", ["block", "svd"])
def test_init_a(W: Tensor, init: str) -> None:
    A = init_A(W, R, 4, init)
    assert A.shape == (R, 4) and A.dtype == torch.float32
    assert float(torch.linalg.matrix_norm(A, 2)) == pytest.approx(1, rel=1e-6)
    if init == "block":
        torch.testing.assert_close(A / A[0, 0], (W[:R, :4] / W[0, 0]).float())
    else:
        # W[:r]·V_m: the same Gram matrix as W[:r] when m spans all of W's right space.
        full = init_A(W, R, IN, "svd").double()
        gram = W[:R] @ W[:R].T
        torch.testing.assert_close(
            full @ full.T, gram / torch.linalg.matrix_norm(gram, 2), atol=1e-6, rtol=1e-5
        )
    narrow = init_A(W, 4, 2, init)
    assert narrow.shape == (4, 2) and torch.linalg.matrix_rank(narrow) == 2
    with pytest.raises(ConfigError, match="at least 1"):
        init_A(W, 4, 0, init)
