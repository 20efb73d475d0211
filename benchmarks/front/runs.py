"""The runs of plan.yaml: what each one is, which can start now, and what is finished."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from benchmarks.experiment.runs import read_runs

HERE = Path(__file__).resolve().parent
PLAN: dict[str, Any] = yaml.safe_load((HERE / "plan.yaml").read_text())
RESULTS = HERE.parent / "results" / "front"
FILE = RESULTS / "runs.jsonl"


@dataclass(frozen=True)
class Job:
    """One training with what is measured of it."""

    name: str
    kind: str
    """``sweep`` (validation rows), ``test`` (test rows and questions) or ``continual``."""
    task: str
    variant: str
    lr: float
    seed: int
    settings: dict[str, Any] = field(default_factory=dict)
    """Of ``TrainConfig``, all that the plan fixes for this run."""

    @property
    def result(self) -> dict[str, Any] | None:
        """What the run measured; None while it is not finished."""
        return read_runs(FILE).get(self.name)


def sweep(task: str, variant: str) -> list[Job]:
    """The runs that a learning rate is chosen from, by rising rate; one seed, validation rows."""
    spec = PLAN["variants"][variant]
    rates = sorted(float(lr) for lr in spec.get("rates", {}).get(task, spec["lrs"]))
    return [_job("sweep", task, variant, lr, PLAN["seeds"][0]) for lr in rates]


def wanted_score(task: str) -> float | None:
    """The validation score that variants are compared at; None while the reference is missing.

    It is the best of the reference's sweep less the margin.
    """
    scores = [job.result["score"] for job in sweep(task, PLAN["reference"]) if job.result]
    if len(scores) < len(sweep(task, PLAN["reference"])):
        return None
    return max(scores) - float(PLAN["margin"])


def chosen(task: str, name: str) -> tuple[str, float] | None:
    """Return the variant and the rate of the test runs; None while runs that decide it are missing.

    Of the rates whose validation score is at least :func:`wanted_score` the one with the smallest
    KL; where there is none, the rate with the best score. The same for every variant, the
    reference included.

    Args:
        name: a variant, or one of the plan's choices between several.
    """
    variants = PLAN.get("choices", {}).get(name, [name])
    jobs, wanted = [job for variant in variants for job in sweep(task, variant)], wanted_score(task)
    found = [(job, job.result) for job in jobs if job.result]
    if wanted is None or not jobs or len(found) < len(jobs):
        return None
    level = [
        (result["kl"], job.lr, job.variant) for job, result in found if result["score"] >= wanted
    ]
    if level:
        _, lr, variant = min(level)
    else:
        ranked = [(result["score"], -result["kl"], job.lr, job.variant) for job, result in found]
        *_, lr, variant = max(ranked)
    return variant, lr


def chosen_lr(task: str, name: str) -> float | None:
    """Return the rate that :func:`chosen` returns."""
    choice = chosen(task, name)
    return None if choice is None else choice[1]


def tests(task: str, name: str) -> list[Job]:
    """The test runs of a variant or choice on a task, by seed; none before its rate is known."""
    choice = chosen(task, name)
    if choice is None:
        return []
    variant, lr = choice
    seeds = PLAN["seeds"] if name in PLAN["claimed"] else PLAN["seeds"][: PLAN["front_seeds"]]
    return [_job("test", task, variant, lr, seed) for seed in seeds]


def continual() -> list[Job]:
    """The sequences of tasks whose learning rates are known: those chosen on the first task."""
    jobs = []
    for strategy, variants in PLAN["continual"]["runs"].items():
        for name, seeds in variants.items():
            choice = chosen(next(iter(PLAN["tasks"])), name)
            if choice is not None:
                jobs += [_job("continual", strategy, *choice, s) for s in PLAN["seeds"][:seeds]]
    return sorted(jobs, key=lambda job: job.seed)


def _job(kind: str, task: str, variant: str, lr: float, seed: int) -> Job:
    """Return a run; of a sequence ``task`` is the strategy."""
    spec = {k: v for k, v in PLAN["variants"][variant].items() if k not in ("lrs", "rates")}
    if kind == "continual":
        plan = PLAN["continual"]
        replays = plan["replaying"] if task in ("er", "ilora") else {}
        of_task = plan["common"] | replays | {"strategy": task}
    else:
        of_task = PLAN["tasks"][task]
    settings = PLAN["common"] | of_task | spec
    return Job(f"{kind}-{task}-{variant}-{lr:g}-{seed}", kind, task, variant, lr, seed, settings)


def _of_stage(stage: dict[str, Any]) -> list[Job]:
    """The runs of a stage whose settings are fixed by now."""
    if stage["kind"] == "continual":
        return continual()
    pairs = [(task, variant) for task in stage["tasks"] for variant in stage["variants"]]
    if stage["kind"] == "sweep":
        # Each variant's middle rates first, then the smaller ones, which decide what is chosen: so
        # a queue that is stopped early shows something.
        ranked = [
            (abs(2 * number - len(jobs) + 1) // 2, 2 * number >= len(jobs), job)
            for jobs in (sweep(*pair) for pair in pairs)
            for number, job in enumerate(jobs)
        ]
        return [job for *_, job in sorted(ranked, key=lambda entry: entry[:2])]
    seeds = PLAN["seeds"][: stage["seeds"]]
    found = [job for pair in pairs for job in tests(*pair) if job.seed in seeds]
    return sorted(found, key=lambda job: job.seed)


def known() -> list[Job]:
    """All runs whose settings are fixed by now, in the order of the queue."""
    return list({job.name: job for stage in PLAN["stages"] for job in _of_stage(stage)}.values())


def waiting() -> Iterator[Job]:
    """What can run now and is not finished, in the order of the queue."""
    return (job for job in known() if job.result is None)
