"""Proves that rows and columns are ranked by energy: smallest first, those without signal last, a
smaller rank a prefix of a larger one; and that an adapter's ``selection`` is checked.

Needs NumPy and torch only.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from secura_serve import ConfigError
from secura_serve.method import Ranking, rank_by_energy, select, selection_problem

DIGEST = "0123456789abcdef" * 2


def test_the_smallest_energy_comes_first_and_the_dead_come_last() -> None:
    energy = np.array([4.0, 0.0, 1.0, 3.0, 1.0, 1e-9, 2.0, 9.0], dtype=np.float32)
    order, usable = rank_by_energy(energy)
    assert order.tolist() == [2, 4, 6, 3, 0, 7, 1, 5] and usable == 6
    # Per squared norm; 7 is the largest row, and what is dead stays dead.
    norms = np.array([1, 1, 1, 1, 2, 1e-12, 1, 100], dtype=np.float32)
    order, usable = rank_by_energy(energy, norms)
    assert order.tolist() == [7, 4, 2, 6, 3, 0, 1, 5] and usable == 6


def test_no_signal_at_all_leaves_nothing_usable() -> None:
    order, usable = rank_by_energy(np.zeros(3), np.zeros(3))
    assert order.tolist() == [0, 1, 2] and usable == 0
    for bad in ([1.0, np.nan], [np.inf, 1.0], [-1.0, 1.0]):
        with pytest.raises(ConfigError, match="not finite"):
            rank_by_energy(np.array(bad))


def test_a_ranking_overrides_the_rule_and_ranks_are_prefixes() -> None:
    W = torch.randn(5, 4)
    ranking = Ranking(np.array([4, 2, 0, 1, 3]), np.array([3, 0, 1, 2]), 4, 3)
    three, two = (select(W, r, module="m", ranking=ranking) for r in (3, 2))
    assert three.rows.tolist() == [4, 2, 0] and three.cols.tolist() == [3, 0, 1]
    assert all(map(torch.equal, three.prefix(2), two))
    for r in (0, 4):
        with pytest.raises(ConfigError, match=rf"m: rank {r} is not allowed.*1 <= r <= 3"):
            select(W, r, module="m", ranking=ranking)
    with pytest.raises(ConfigError, match="m: the basis ranks 5 rows and 4 columns"):
        select(W.T, 2, module="m", ranking=ranking)


def test_the_rule_by_name_says_that_it_needs_a_file() -> None:
    with pytest.raises(ConfigError, match="'calibrated' ranks by what was measured.*--basis FILE"):
        select(torch.randn(4, 4), 2, module="m", rule="calibrated")


@pytest.mark.parametrize(
    ("selection", "fine"),
    [
        ({"rule": "inverse_sampled", "seed": 0}, True),
        ({"rule": "calibrated", "seed": 3, "basis": DIGEST}, True),
        ({"rule": "calibrated", "seed": 3}, False),
        ({"rule": "calibrated", "seed": 3, "basis": None}, False),
        ({"rule": "calibrated", "seed": 3, "basis": DIGEST[:-1]}, False),
        ({"rule": "calibrated", "seed": "3", "basis": DIGEST}, False),
        ({"rule": "calibrated", "seed": True, "basis": DIGEST}, False),
        ({"rule": "lowest_norm", "seed": 0, "basis": DIGEST}, False),
        ({"rule": ["calibrated"], "seed": 0, "basis": DIGEST}, False),
        ({"rule": "best", "seed": 0}, False),
        ({"rule": "calibrated", "seed": 0, "basis": DIGEST, "more": 1}, False),
        ("calibrated", False),
        (None, False),
    ],
)
def test_a_selection_is_checked(selection: Any, fine: bool) -> None:
    needs = selection_problem(selection)
    assert (needs is None) == fine
    assert fine or "calibrated also needs basis" in str(needs)
