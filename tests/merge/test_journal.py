"""Proves that a journal has enough bits for every number that a weight can be.

Needs torch only: the furthest that ``bounded`` can move each number of a dtype, in float64.
"""

from __future__ import annotations

import pytest
import torch

from secura_serve.merge.fold.journal import Journal, journal_bits
from secura_serve.method import MagNorm


def furthest(dtype, tau):
    """How many numbers W' is from W at most, over all finite W."""
    W = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    W = W[torch.isfinite(W)]
    moved = [(W.double() * (1 + step)).to(dtype) for step in (-tau, tau)]
    distances = [new.view(torch.int16).int() - W.view(torch.int16).int() for new in moved]
    return max(
        int(d[torch.isfinite(new)].abs().max()) for d, new in zip(distances, moved, strict=True)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_bits_hold_whatever_a_weight_is(dtype):
    for tau in (
        1e-4,
        0.003,
        0.0036,
        0.0037,
        0.02,
        0.025,
        0.029,
        0.03,
        0.06,
        0.063,
        0.1,
        0.33,
        0.49,
    ):
        bits, most = journal_bits(MagNorm("bounded", tau=tau), dtype), furthest(dtype, tau)
        # Neither too few nor more than it takes.
        assert bits == (4 if most < 8 else 8 if most < 128 else 0), (tau, bits, most)


def test_the_default_bound_takes_4_bits_in_bfloat16():
    assert journal_bits(MagNorm("bounded"), torch.bfloat16) == 4
    assert furthest(torch.bfloat16, 0.02) == 5


@pytest.mark.parametrize(
    ("norm", "dtype"),
    [
        (MagNorm("none"), torch.bfloat16),
        (MagNorm("published"), torch.bfloat16),
        (MagNorm("bounded"), torch.float32),
        (MagNorm("bounded", tau=3.0), torch.bfloat16),
    ],
)
def test_what_has_no_bound_has_no_journal(norm, dtype):
    assert journal_bits(norm, dtype) == 0


@pytest.mark.parametrize(("bits", "nbytes"), [(4, 3 * 4), (8, 3 * 7)])
def test_a_journal_takes_its_bits(bits, nbytes):
    W = torch.zeros(3, 7, dtype=torch.bfloat16)
    assert Journal.empty(W, bits).data.nbytes == Journal.nbytes(W, bits) == nbytes
