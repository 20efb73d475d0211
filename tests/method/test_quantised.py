"""Proves the 8-bit form of an update against float64 loops, and its bound. Needs torch only."""

from __future__ import annotations

import pytest
import torch

from secura_serve.method import dequantise_rows, quantise_rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (33, 64)])
def test_equals_loops_and_keeps_its_bound(shape, dtype):
    D = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 1e-3).to(dtype)
    Q, scale = quantise_rows(D)
    assert Q.dtype == torch.int8 and scale.dtype == torch.float32
    for i, row in enumerate(D.double().tolist()):
        step = max(map(abs, row)) / 127
        assert scale[i].item() == pytest.approx(step, rel=1e-6)
        for j, value in enumerate(row):
            assert abs(Q[i, j].item() - value / step) <= 0.5 + 1e-4
    assert ((dequantise_rows(Q, scale) - D.float()).abs() <= scale[:, None] * (0.5 + 1e-4)).all()


def test_rows_of_zeros_and_the_smallest_numbers_stay_finite():
    D = torch.zeros(3, 4)
    D[1] = 1e-45
    D[2] = torch.tensor([1e30, -1e30, 1.0, 0.0])
    Q, scale = quantise_rows(D)
    assert not Q[0].any() and scale[0] == 0
    assert torch.isfinite(scale).all() and (dequantise_rows(Q, scale)[1].abs() <= 1e-44).all()
    assert Q[2].tolist() == [127, -127, 0, 0]


def test_the_sign_is_the_only_difference_of_the_opposite_update():
    D = torch.randn(4, 9, generator=torch.Generator().manual_seed(1))
    (Q, scale), (P, other) = quantise_rows(D), quantise_rows(-D)
    assert torch.equal(Q, -P) and torch.equal(scale, other)
