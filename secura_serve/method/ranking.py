"""A ranking of the rows and columns of W by what was measured, in place of a selection rule."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from secura_serve.errors import ConfigError

__all__ = ["DEAD", "Ranking", "rank_by_energy"]

DEAD = 1e-6
"""Share of the median energy below which a row or column carries no signal worth training on."""


class Ranking(NamedTuple):
    """All rows and all columns of one W, the first choice in front, those without signal last."""

    rows: np.ndarray
    """``(out,)`` integers, each index once."""
    cols: np.ndarray
    """``(in,)`` integers, each index once."""
    usable_rows: int
    """How many rows, from the front, carry a signal."""
    usable_cols: int

    def first(self, r: int, shape: tuple[int, ...], module: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the first r rows and the first r columns, which every larger rank begins with.

        Raises:
            ConfigError: the ranking is one of another shape, or r is larger than what is usable.
        """
        if (len(self.rows), len(self.cols)) != tuple(shape):
            raise ConfigError(
                f"{module}: the basis ranks {len(self.rows)} rows and {len(self.cols)} columns, "
                f"and W has shape {tuple(shape)}; make a basis of this base with secura-basis"
            )
        usable = min(self.usable_rows, self.usable_cols)
        if not 1 <= r <= usable:
            raise ConfigError(
                f"{module}: rank {r} is not allowed; the basis has {self.usable_rows} rows and "
                f"{self.usable_cols} columns with a signal, so choose 1 <= r <= {usable}"
            )
        return self.rows[:r], self.cols[:r]


def rank_by_energy(
    energy: np.ndarray, squared_norms: np.ndarray | None = None
) -> tuple[np.ndarray, int]:
    """Return all indices, smallest energy first, and how many of them are usable.

    An index is dead if its energy is at most :data:`DEAD` times the median of those above 0: it
    would get no gradient. Dead ones come last; ties are broken by index.

    Args:
        energy: ``(n,)``, mean squared activations or gradients, finite and >= 0.
        squared_norms: ``(n,)``; if given, the rank is by energy over squared norm. What is dead
            is decided by the energy alone.

    Raises:
        ConfigError: an energy is NaN, infinite or negative.
    """
    if not np.isfinite(energy).all() or (energy < 0).any():
        raise ConfigError("the measured energies are not finite; try --dtype float32")
    positive = energy[energy > 0]
    floor = DEAD * float(np.median(positive)) if len(positive) else 0.0
    dead = energy <= floor
    scores = energy.astype(np.float64)
    if squared_norms is not None:
        scores = scores / np.maximum(squared_norms.astype(np.float64), np.finfo(np.float64).tiny)
    order: np.ndarray = np.lexsort((np.arange(len(energy)), scores, dead))
    return order, int(np.count_nonzero(~dead))
