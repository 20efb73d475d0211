"""Whether the bars of plan.yaml are met, from the test runs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.experiment.report import mean
from benchmarks.front.runs import PLAN, Job, tests

__all__ = ["Verdict", "apart", "finished", "level", "verdicts"]

_DRAWS = 10_000


@dataclass(frozen=True)
class Verdict:
    """One variant against the peer of one bar on one task."""

    bar: str
    task: str
    variant: str
    peer: str
    seeds: int
    """That both have finished; the comparison is over these alone."""
    score_difference: float
    score_interval: tuple[float, float]
    kl_ratio: float
    apart: bool | None
    """Whether the 95 % intervals of KL are; None with one seed."""
    limit: float

    @property
    def level(self) -> bool:
        """Whether the score is level: the interval of the difference ends above −2 points."""
        return self.score_interval[0] >= -float(PLAN["level"])

    @property
    def holds(self) -> bool | None:
        """Whether the bar is met; None as long as too few seeds are finished to say so."""
        if not self.level or self.kl_ratio > self.limit:
            return False
        if self.seeds < len(PLAN["seeds"]):
            return None
        return bool(self.apart) or not PLAN["bars"][self.bar]["apart"]


def finished(task: str, variant: str) -> dict[int, dict[str, Any]]:
    """Return seed -> what the finished test runs of a variant measured."""
    jobs: list[Job] = tests(task, variant)
    return {job.seed: job.result for job in jobs if job.result is not None}


def level(one: Sequence[str], other: Sequence[str]) -> tuple[float, tuple[float, float]]:
    """Return the difference of two scores and its paired 95 % interval over rows and seeds.

    Args:
        one, other: for each seed, ``"1"`` or ``"0"`` per test row, the same rows in both. Rows are
            drawn again and again (percentile bootstrap), each with what all its seeds say.
    """
    gains = np.array(
        [
            [int(a) - int(b) for a, b in zip(x, y, strict=True)]
            for x, y in zip(one, other, strict=True)
        ]
    ).mean(0)
    draws = np.random.default_rng(0).integers(0, len(gains), (_DRAWS, len(gains)))
    low, high = np.percentile(gains[draws].mean(1), [2.5, 97.5])
    return float(gains.mean()), (float(low), float(high))


def apart(one: Sequence[float], other: Sequence[float]) -> bool | None:
    """Say whether Student's 95 % intervals of two KLs are, of their logarithms; None for one seed.

    Of logarithms because a KL is positive and varies by a share of itself.
    """
    if len(one) < 2 or len(other) < 2:
        return None
    first, second = (mean([math.log(v) for v in values])["interval"] for values in (one, other))
    return bool(first[1] < second[0] or second[1] < first[0])


def verdicts() -> list[Verdict]:
    """Return the verdict on each bar, for each candidate and task with a finished test run."""
    found = []
    for bar, rule in PLAN["bars"].items():
        for variant in rule["candidates"]:
            for task in PLAN["tasks"]:
                ours, theirs = finished(task, variant), finished(task, rule["peer"])
                seeds = sorted(ours.keys() & theirs.keys())
                if not seeds:
                    continue
                difference, interval = level(
                    [ours[s]["right"] for s in seeds], [theirs[s]["right"] for s in seeds]
                )
                kls = [[runs[s]["kl"] for s in seeds] for runs in (ours, theirs)]
                found.append(
                    Verdict(
                        bar, task, variant, rule["peer"], len(seeds), difference, interval,
                        statistics.mean(kls[0]) / statistics.mean(kls[1]), apart(*kls),
                        float(rule["limit"]),
                    )
                )  # fmt: skip
    return found
