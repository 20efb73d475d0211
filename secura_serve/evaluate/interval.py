"""How sure an accuracy is, and whether two models differ on the same items."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["METHOD", "Interval", "Paired", "paired", "wilson"]

METHOD = (
    "Intervals are 95 %: Wilson's for an accuracy, a bootstrap over the items (10,000 draws) for a "
    "difference. p is McNemar's exact test on the items where two models differ."
)
_Z = 1.959963984540054
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
    """The score interval of Wilson (1927): where |p̂ − p| <= z·sqrt(p(1 − p)/n).

    Raises:
        ValueError: no items.
    """
    n, k = len(right), sum(right)
    if not n:
        raise ValueError("an accuracy of no items")
    p, square = k / n, _Z**2
    middle = (p + square / (2 * n)) / (1 + square / n)
    half = _Z * math.sqrt(p * (1 - p) / n + square / (4 * n**2)) / (1 + square / n)
    # At 0 and 1 the bound is p itself; rounding must not push it beyond.
    return Interval(p, min(p, max(0.0, middle - half)), max(p, min(1.0, middle + half)), k, n)


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
    """Difference in accuracy, its percentile bootstrap interval, and McNemar's exact p.

    p = min(1, 2·P[X <= min(better, worse)]), X ~ Binomial(better + worse, ½) (McNemar 1947).

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
    tail = sum(math.comb(unequal, i) for i in range(min(better, worse) + 1)) / 2**unequal
    return Paired(
        float(gain.mean()), float(low), float(high), better, worse, min(1.0, float(2 * tail))
    )
