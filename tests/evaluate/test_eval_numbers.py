"""Proves the formulas of the reports: intervals against exact values and simulation.

Needs numpy and scipy alone.
"""

from __future__ import annotations

import math

import numpy as np
import pytest

from secura_serve.evaluate import paired, wilson


def test_wilson_bounds_solve_their_equation() -> None:
    # The bounds are where |p̂ − p| is z standard errors of p: put them in and see.
    for right, n in ((1, 10), (150, 200), (199, 200)):
        found = wilson([True] * right + [False] * (n - right))
        assert (found.accuracy, found.right, found.n) == (right / n, right, n)
        for p in (found.low, found.high):
            assert abs(right / n - p) == pytest.approx(
                1.959964 * math.sqrt(p * (1 - p) / n), rel=1e-5
            )
    # Textbook value for 0 of 10: z²/(n + z²).
    assert wilson([False] * 10).low == 0
    assert wilson([False] * 10).high == pytest.approx(3.841459 / 13.841459, rel=1e-5)
    with pytest.raises(ValueError, match="no items"):
        wilson([])


def test_paired_counts_items_and_is_exact() -> None:
    model = [True] * 8 + [False] * 2 + [True] * 10
    base = [False] * 8 + [True] * 2 + [True] * 10
    found = paired(model, base)
    assert (found.better, found.worse, found.difference) == (8, 2, pytest.approx(0.3))
    # 2·(C(10,0) + C(10,1) + C(10,2)) / 2^10
    assert found.p == pytest.approx(2 * 56 / 1024)
    # An item-by-item bootstrap, written out.
    gain = np.array(model, float) - np.array(base, float)
    rng = np.random.default_rng(1)
    means = [gain[rng.integers(0, 20, 20)].mean() for _ in range(4000)]
    assert [found.low, found.high] == pytest.approx(np.percentile(means, [2.5, 97.5]), abs=0.051)
    same = paired(base, base)
    assert (same.difference, same.low, same.high, same.p) == (0, 0, 0, 1)


def test_scipy_gives_what_the_formulas_give() -> None:
    # Wilson's interval and McNemar's exact p, written out.
    z = 1.959963984540054
    for n in (1, 2, 7, 50, 200, 1319):
        for right in {0, 1, n // 3, n // 2, n - 1, n}:
            found = wilson([True] * right + [False] * (n - right))
            p, square = right / n, z**2
            middle = (p + square / (2 * n)) / (1 + square / n)
            half = z * math.sqrt(p * (1 - p) / n + square / (4 * n**2)) / (1 + square / n)
            assert found.low == pytest.approx(max(0.0, middle - half), abs=1e-9)
            assert found.high == pytest.approx(min(1.0, middle + half), abs=1e-9)
            assert found.low <= p <= found.high
    for better, worse in ((0, 1), (1, 1), (8, 2), (2, 8), (30, 41), (100, 0), (300, 299)):
        model, base = [True] * better + [False] * worse, [False] * better + [True] * worse
        tail = sum(math.comb(better + worse, i) for i in range(min(better, worse) + 1))
        exact = min(1.0, 2 * tail / 2 ** (better + worse))
        assert paired(model, base).p == pytest.approx(exact, abs=1e-9)
