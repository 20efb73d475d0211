"""Intervals of an accuracy, and whether two models differ on the same items."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest

__all__ = ["METHOD", "Interval", "Paired", "paired", "wilson"]

METHOD = (
    "Intervals are 95 %: Wilson's for an accuracy, a bootstrap over the items (10,000 draws) for a "
    "difference. p is McNemar's exact test on the items where two models differ."
)
_DRAWS = 10_000


@dataclass(frozen=True)
class Interval:
    """An accuracy with its 95 % interval."""

    accuracy: float
    low: float
    high: float
    right: int
    n: int


def wilson(right: Sequence[bool]) -> Interval:
    """Return the accuracy with the score interval of Wilson (1927).

    Its bounds are where |p̂ − p| <= z·sqrt(p(1 − p)/n); from ``scipy.stats``.

    Raises:
        ValueError: no items.
    """
    n, k = len(right), sum(right)
    if not n:
        raise ValueError("an accuracy of no items")
    p = k / n
    bounds = binomtest(k, n).proportion_ci(confidence_level=0.95, method="wilson")
    # At 0 and 1 the bound is p itself; rounding must not push it beyond.
    return Interval(
        p, min(p, max(0.0, float(bounds.low))), max(p, min(1.0, float(bounds.high))), k, n
    )


@dataclass(frozen=True)
class Paired:
    """A model against a reference on the same items."""

    difference: float
    """Accuracy of the model less that of the reference."""
    low: float
    high: float
    better: int
    """Items that only the model got right."""
    worse: int
    """Items that only the reference got right."""
    p: float


def paired(model: Sequence[bool], reference: Sequence[bool]) -> Paired:
    """Return the difference in accuracy, its percentile bootstrap interval, McNemar's exact p.

    p is the two-sided binomial test of ``better`` in better + worse at ½ (McNemar 1947), from
    ``scipy.stats``; 1 where the models differ on no item.

    Raises:
        ValueError: no items, or not as many of one as of the other.
    """
    gain = np.array([int(a) - int(b) for a, b in zip(model, reference, strict=True)])
    if not len(gain):
        raise ValueError("a comparison of no items")
    better, worse = int((gain > 0).sum()), int((gain < 0).sum())
    # A resample is known by how many of the three kinds of item it drew.
    n = len(gain)
    shares = np.array([better, worse, n - better - worse]) / n
    drawn = np.random.default_rng(0).multinomial(n, shares, size=_DRAWS)
    low, high = np.percentile((drawn[:, 0] - drawn[:, 1]) / n, [2.5, 97.5])
    unequal = better + worse
    p = float(binomtest(better, unequal, 0.5).pvalue) if unequal else 1.0
    return Paired(float(gain.mean()), float(low), float(high), better, worse, p)
