"""Proves the compiled fold: its numbers equal plain float64 loops, and torch's bit for bit where no
exp() is involved, roundings, subnormals and signed zeros included; its sums are those of what it
wrote and show NaN and Inf; several processes can compile it at once; without it torch folds.

Needs torch and a C compiler; no network.
"""

from __future__ import annotations

import itertools
import logging
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from secura_serve.merge import Part, Target, fold_weight
from secura_serve.method import Basis, FoldStats, MagNorm, apply, native, write
from secura_serve.method.fold_stats import measure_change
from secura_serve.method.native import binding
from secura_serve.method.product import product

KINDS = (torch.bfloat16, torch.float16, torch.float32)
NORMS = (MagNorm(), MagNorm("bounded", tau=0.05), MagNorm("bounded", tau=1.0), MagNorm("published"))


def same(a: Tensor, b: Tensor) -> bool:
    """Equal bits, any NaN for any NaN."""
    unsigned = {2: torch.int16, 4: torch.int32}[a.element_size()]
    return bool(((a.view(unsigned) == b.view(unsigned)) | (a.isnan() & b.isnan())).all())


def close(a: Tensor, b: Tensor, W: Tensor, norm: MagNorm) -> bool:
    """Within 2 steps of float32 at the larger of W and W', as many more as τ lets σ's errors in;
    equal bits where there is no exp().
    """
    if norm.mode == "none":
        return same(a, b)
    step = np.spacing(torch.maximum(W.float().abs(), a.abs()).numpy())
    steps = 2 + 2 * dict(norm.parameters).get("tau", 0.02)
    return bool(((a - b).abs() <= steps * torch.from_numpy(step)).all())


def exact(w: float, d: float, norm: MagNorm, peak: float) -> float:
    """The table of magnorm.py for one weight."""
    if norm.mode == "none":
        return w + d
    if norm.mode == "bounded":
        reach = norm.tau * abs(w)
        return w + reach * math.tanh(d / reach) if reach >= 2.0**-126 else w
    rho = abs(d) / (abs(w) + norm.eps)
    return (2 * w + d) / (2 - 1 / (1 + math.exp(-norm.scale * (rho / peak - 0.5))))


def numbers(kind: torch.dtype, *shape: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """W with zeros of both signs, subnormals and large weights; Δ from far below to far above."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(*shape, generator=generator)
    size = torch.randint(-12, 5, shape, generator=generator)
    delta = torch.randn(*shape, generator=generator) * 2.0**size
    special = torch.tensor([0.0, -0.0, 1e-7, -1e-39, 1e-40, 3e4, -65504.0, 1e-20])
    W.view(-1)[: len(special)] = special[: W.numel()]
    return W.to(kind), delta


@pytest.fixture(autouse=True)
def compiled() -> Iterator[None]:
    assert native.is_supported(*[torch.zeros(1)] * 3), "these tests need a C compiler"
    yield
    binding._library.cache_clear()


@pytest.mark.parametrize("norm", NORMS, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (7, 673), (2, 2048)], ids=str)
def test_equals_float64_loops(norm: MagNorm, shape: tuple[int, int]) -> None:
    for kind in KINDS:
        W, delta = numbers(kind, *shape)
        peak = float(np.float32(float((delta.abs() / (W.float().abs() + 1e-8)).max())))
        out = torch.empty(shape)
        assert write(out, W, delta, norm, peak=peak) is not None
        flat = zip(W.view(-1).tolist(), delta.view(-1).tolist(), strict=True)
        expected = torch.tensor([exact(w, d, norm, peak) for w, d in flat], dtype=torch.float64)
        found = out.double().view(-1)
        # Between 1 and 2 in W: what the sigmoid loses is a share of reach, not of W'.
        slack = 3e-7 * (W.double().abs().view(-1) + expected.abs()) + 1e-45
        assert bool(((found - expected).abs() <= slack).all())
        if norm.mode == "bounded":
            bound = torch.nextafter(norm.tau * W.float().abs(), torch.tensor(math.inf)).double()
            moved = (out.double() - W.double()).abs()
            half = torch.from_numpy(np.spacing(out.abs().numpy())).double() / 2
            assert bool((moved <= bound + half).all())


@pytest.mark.parametrize("norm", NORMS, ids=str)
def test_every_dtype_is_the_float32_result_rounded_once(norm: MagNorm) -> None:
    for kind, to in itertools.product(KINDS, KINDS):
        W, delta = numbers(kind, 37, 211)
        wide, out = torch.empty(W.shape), torch.empty(W.shape, dtype=to)
        write(wide, W, delta, norm, peak=3.0)
        write(out, W, delta, norm, peak=3.0)
        assert same(out, wide.to(to)) and same(wide, apply(W.float(), delta, norm, peak=3.0))


def test_every_half_number_is_read_and_every_tie_is_rounded_as_torch_does() -> None:
    for kind in (torch.bfloat16, torch.float16):
        W = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(kind)
        minus_zero = torch.full(W.shape, -0.0)
        wide = torch.empty(W.shape)
        write(wide, W, minus_zero, MagNorm())
        assert same(wide, W.float())
        # Half-way between neighbours, and a little to either side of that.
        middle = (wide.double() + torch.roll(wide, -1).double()) / 2
        for nudge in (0, 1e-4, -1e-4):
            values = (middle * (1 + nudge)).float()
            out = torch.empty(W.shape, dtype=kind)
            write(out, values, minus_zero, MagNorm())
            assert same(out, values.to(kind))
    bits = torch.randint(-(2**31), 2**31, (2**20,), generator=torch.Generator().manual_seed(0))
    anything = bits.to(torch.int32).view(torch.float32)
    for kind in KINDS:
        out = torch.empty(anything.shape, dtype=kind)
        write(out, anything, torch.full_like(anything, -0.0), MagNorm())
        assert same(out, anything.to(kind))


@pytest.mark.parametrize("norm", NORMS, ids=str)
def test_torch_is_close_and_none_the_same(norm: MagNorm) -> None:
    for seed in range(3):
        W, delta = numbers(torch.float32, 300, 1001, seed=seed)
        ours = apply(W, delta, norm, peak=9.0)
        trained = apply(W, delta.clone().requires_grad_(), norm, peak=9.0)
        assert trained.requires_grad
        assert close(ours, trained.detach(), W, norm)


@pytest.mark.parametrize("norm", NORMS, ids=str)
def test_sums_are_those_of_what_was_written(norm: MagNorm) -> None:
    for kind, to in itertools.product(KINDS, KINDS):
        # float16 ends at 65504, and a change of 1e-40 has no ratio in float32: not here.
        W, delta = (t.clamp(-100, 100) for t in numbers(kind, 61, 613))
        W[W.abs() < 1e-6] = 0
        out, wide = torch.empty(W.shape, dtype=to), torch.empty(W.shape)
        sums = write(out, W, delta, norm, peak=9.0)
        write(wide, W, delta, norm, peak=9.0)
        old, new, made = W.double(), out.double(), wide.double()
        ratio = ((new - old) / old)[old != 0].abs().max()
        pairs = ((old, 0), (new, old), (made, old), (new, made))
        expected = FoldStats(*(float((a - b).square().sum()) for a, b in pairs), float(ratio))
        assert tuple(sums or ()) == pytest.approx(tuple(expected), rel=1e-5)
        assert tuple(measure_change(W.float(), wide, out)) == pytest.approx(
            tuple(expected), rel=1e-3
        )


@pytest.mark.parametrize("at", [0, 2047, 2048, 5000])
def test_nan_and_inf_show_in_the_sums(at: int) -> None:
    def finite(W: Tensor, delta: Tensor, norm: MagNorm, kind: torch.dtype) -> bool:
        sums = write(torch.empty(W.shape, dtype=kind), W, delta, norm, peak=1.0)
        assert sums is not None
        return math.isfinite(sums.base) and math.isfinite(sums.moved)

    for norm, bad in itertools.product(NORMS, (math.nan, math.inf, -math.inf)):
        W, delta = torch.ones(5001), torch.full((5001,), 0.01)
        assert finite(W, delta, norm, torch.float16)
        W[at] = bad
        assert not finite(W, delta, norm, torch.float32)
        # A sigmoid of Inf is a number, that of NaN is not.
        if math.isnan(bad) or norm.mode == "none":
            W[at], delta[at] = 1, bad
            assert not finite(W, delta, norm, torch.bfloat16)
    W, delta = torch.ones(5001), torch.zeros(5001)
    W[at] = 1e30
    assert finite(W, delta, MagNorm(), torch.bfloat16)
    assert not finite(W, delta, MagNorm(), torch.float16)


@pytest.mark.parametrize("norm", NORMS, ids=str)
def test_any_layout(norm: MagNorm) -> None:
    W, delta = numbers(torch.bfloat16, 65, 129)
    plain = torch.empty(65, 129, dtype=torch.bfloat16)
    sums = write(plain, W, delta, norm, peak=9.0)
    sheet = torch.zeros(200, 140, dtype=torch.bfloat16)
    for out in (torch.empty(129, 65, dtype=torch.bfloat16).T, sheet[5:70, 7:136]):
        laid = W.T.contiguous().T, delta.T.contiguous().T
        assert write(out, *laid, norm, peak=9.0) == pytest.approx(sums, rel=1e-12)
        assert torch.equal(out, plain)
    assert not sheet[:5].any() and not sheet[:, :7].any() and not sheet[:, 136:].any()
    empty = torch.empty(0, 4)
    assert write(empty, empty, empty, norm, peak=1.0) == FoldStats(0, 0, 0, 0, 0)


def chained(L: Tensor, R: Tensor) -> Tensor:
    """L·R by fused multiply-adds: exact product and sum, rounded once, k by k."""
    total = torch.zeros(L.shape[0], R.shape[1])
    for k in range(L.shape[1]):
        total = (total.double() + L[:, k, None].double() * R[k].double()).float()
    return total


def factors_of(out: int, into: int, k: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(k)
    L, R = (torch.randn(*shape, generator=generator) for shape in ((out, k), (k, into)))
    L[:, ::5] = 0
    return L / 50, R


# Around the edges of a tile, of a strip and of what is taken at once of k.
@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1), (3, 5, 9), (14, 32, 1), (15, 33, 8), (13, 31, 150), (29, 511, 32), (225, 513, 7),
     (230, 1100, 64), (40, 600, 256), (17, 40, 257), (5, 530, 600)],
    ids=str,
)  # fmt: skip
def test_a_product_is_a_chain_of_fused_multiply_adds(shape: tuple[int, int, int]) -> None:
    out, into, k = shape
    L, R = factors_of(out, into, k)
    wanted = chained(L, R)
    torch.testing.assert_close(wanted.double(), L.double() @ R.double(), rtol=1e-4, atol=1e-5)
    for left in (L, L.T.contiguous().T):
        assert torch.equal(native.product(left, R), wanted)
    assert torch.equal(native.product(R.T, L.T), wanted.T)
    for norm, kind in itertools.product(NORMS, KINDS):
        W, _ = numbers(kind, out, into)
        whole, fused = torch.empty_like(W), torch.empty_like(W)
        sums = write(whole, W, wanted, norm, peak=9.0)
        found = write(fused, W, (L, R), norm, peak=9.0)
        assert same(fused, whole) and found == pytest.approx(sums, rel=1e-12, nan_ok=True)
        across = torch.empty_like(W).T
        write(across, W.T, (R.T, L.T), norm, peak=9.0)
        assert same(across.T.contiguous(), whole)


def test_a_product_is_differentiable_and_has_the_bits_of_the_fold() -> None:
    for k in (4, 64, 300):
        L, R = factors_of(50, 70, k)
        assert torch.equal(product(L, R), chained(L, R))
        assert product(L.requires_grad_(), R).requires_grad


def test_several_parts_and_a_transposed_weight_are_one_product() -> None:
    W, _ = numbers(torch.bfloat16, 90, 70)
    W[-1] = 1
    parts = tuple(
        Part(str(r), weight, torch.randn(r, r, generator=torch.Generator().manual_seed(r)) / 50,
             Basis(torch.arange(20, 20 + r), torch.arange(20, 20 + r)), "")
        for r, weight in ((3, 1.0), (17, -0.5), (30, 2.0))
    )  # fmt: skip
    D = sum(
        p.weight * W[:, p.basis.cols].double() @ p.U.double() @ W[p.basis.rows].double()
        for p in parts
    )
    for transposed, norm in itertools.product((False, True), NORMS[:3]):
        stored = W.T.contiguous() if transposed else W
        new, change = fold_weight(stored, Target("m", parts, transposed), norm, torch.float32)
        found = (new.T if transposed else new).double()
        flat = zip(W.double().view(-1).tolist(), D.reshape(-1).tolist(), strict=True)
        wanted = torch.tensor([exact(w, d, norm, 1.0) for w, d in flat], dtype=torch.float64)
        torch.testing.assert_close(found.reshape(-1), wanted, rtol=1e-4, atol=1e-6)
        assert change is not None and math.isfinite(change.relative)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_inf_in_a_factor_show_in_the_sums(bad: float) -> None:
    for side in (0, 1):
        pair = factors_of(31, 530, 3)
        pair[side][-1, -1] = bad
        W = torch.ones(31, 530)
        sums = write(torch.empty_like(W), W, pair, MagNorm())
        assert sums is not None and not math.isfinite(sums.moved)


def folded() -> list[Any]:
    W, _ = numbers(torch.bfloat16, 300, 200)
    W[:2] = 1
    part = Part("a", 1.0, torch.eye(8) / 100, Basis(torch.arange(30, 38), torch.arange(8)), "", 1.0)
    return [fold_weight(W, Target("m", (part,)), norm, torch.float32) for norm in NORMS]


def test_the_same_fold_without_it(monkeypatch: Any) -> None:
    ours = folded()
    monkeypatch.setenv("SECURA_NATIVE", "0")
    binding._library.cache_clear()
    assert not native.is_supported(*[torch.zeros(1)] * 3)
    for (a, left), (b, right), norm in zip(ours, folded(), NORMS, strict=True):
        assert close(a, b, a, norm)
        assert (left.relative, left.largest, left.lost) == pytest.approx(
            (right.relative, right.largest, right.lost), rel=1e-3
        )


@pytest.mark.parametrize("harm", ["no compiler", "it fails", "no folder", "no sense"])
def test_a_missing_compiler_is_said_once_and_torch_folds(
    harm: str, tmp_path: Path, monkeypatch: Any, caplog: Any
) -> None:
    (tmp_path / "file").touch()
    compilers = {"no compiler": "/nowhere/cc", "it fails": "false", "no sense": "cc 'x"}
    monkeypatch.setenv("CC", compilers.get(harm, "cc"))
    monkeypatch.setenv("SECURA_CACHE", str(tmp_path / ("file" if harm == "no folder" else "new")))
    binding._library.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert len(folded()) == len(folded()) == len(NORMS)
    assert len(caplog.records) == 1 and "fold.c" in caplog.text
    assert not list(tmp_path.rglob("*.so"))


@pytest.mark.long
def test_many_processes_compile_at_once(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("SECURA_CACHE", str(tmp_path))
    code = "from secura_serve.method.native import binding; assert binding._library() is not None"
    children = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(3)]
    assert [child.wait() for child in children] == [0, 0, 0]
    [library] = (tmp_path / "native").iterdir()
    assert library.suffix == ".so" and library.stat().st_mode & 0o022 == 0
