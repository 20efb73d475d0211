"""The experiment of plan.yaml as a queue: what is finished is kept and not run again.

    python -m benchmarks.experiment.run [--jobs 2] [--only lora cur] [--until-minutes 90]

Every run is a process of its own with one thread, and adds one line to
``benchmarks/results/experiment/runs.jsonl``. report.py draws the tables and plots from that file;
to have a run done again, take its line out.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from benchmarks._queue import add_queue_flags, run_process, work_off
from benchmarks.experiment.runs import read_runs

HERE = Path(__file__).resolve().parent
PLAN = yaml.safe_load((HERE / "plan.yaml").read_text())


@dataclass(frozen=True)
class Job:
    """One training with what is measured of it."""

    name: str
    variant: str
    kind: str
    """``tune`` (scored on the validation rows), ``test`` or ``continual``."""
    lr: float
    seed: int
    strategy: str = ""
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def result(self) -> dict[str, Any] | None:
        """What the run measured; None while it is not finished."""
        return read_runs().get(self.name)


def _job(variant: str, spec: dict[str, Any], kind: str, lr: float, seed: int) -> Job:
    settings = {key: value for key, value in spec.items() if key != "lrs"}
    return Job(f"{kind}-{variant}-{lr:g}-{seed}", variant, kind, lr, seed, settings=settings)


def specs() -> dict[str, dict[str, Any]]:
    """Variant -> its settings, of all groups."""
    single = PLAN["single"]
    return single["variants"] | single["dial"] | single["once"] | single["slower"]


def tuning(variant: str) -> list[Job]:
    """The validation runs of a variant; none where there is one learning rate."""
    spec = specs()[variant]
    lrs = spec["lrs"] if len(spec["lrs"]) > 1 else []
    return [_job(variant, spec, "tune", float(lr), PLAN["seeds"][0]) for lr in lrs]


def chosen_lr(variant: str) -> float | None:
    """The learning rate of the test runs; None while the tuning is not finished."""
    jobs = tuning(variant)
    if not jobs:
        return float(specs()[variant]["lrs"][0])
    if any(job.result is None for job in jobs):
        return None
    return max(jobs, key=lambda job: ((job.result or {})["score"], -job.lr)).lr


def tests(variant: str) -> list[Job]:
    """The test runs of a variant, as far as its learning rate is known."""
    lr, single = chosen_lr(variant), PLAN["single"]
    if lr is None:
        return []
    alone, more = variant in single["once"] | single["slower"], single["more_seeds"]
    seeds = PLAN["seeds"][:1] if alone else [*PLAN["seeds"]]
    seeds += more["seeds"] if variant in more["variants"] else []
    return [_job(variant, specs()[variant], "test", lr, seed) for seed in seeds]


def continual() -> list[Job]:
    """The sequences whose learning rates are known."""
    plan, jobs = PLAN["continual"], []
    for variant in plan["variants"]:
        if (lr := chosen_lr(variant)) is None:
            continue
        settings = {k: v for k, v in specs()[variant].items() if k != "lrs"}
        for strategy in plan["strategies"]:
            for seed in plan["seeds"]:
                name = f"continual-{variant}-{strategy}-{seed}"
                jobs.append(Job(name, variant, "continual", lr, seed, strategy, settings))
    return jobs


def waiting(only: list[str] | None) -> Iterator[Job]:
    """What can run now: the first seed of everything first, the dial's other seeds last."""
    names = [name for name in specs() if not only or name in only]
    ready = [job for name in names for job in tests(name)]
    ready.sort(key=lambda job: job.seed)
    later = [job for job in ready if job.variant in PLAN["single"]["dial"] and job.seed]
    jobs = [job for name in names for job in tuning(name)]
    jobs += [job for job in ready if job not in later]
    jobs += [job for job in continual() if not only or job.variant in only]
    return (job for job in [*jobs, *later] if job.result is None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_queue_flags(parser, jobs=2, work=Path("runs/experiment"))
    parser.add_argument("--only", nargs="+", metavar="VARIANT", help="these variants alone")
    given = parser.parse_args()
    if given.dry_run:
        print("\n".join(job.name for job in waiting(given.only)))
        return
    work_off(
        ready=lambda: [job.name for job in waiting(given.only)],
        start=lambda name: run_process("benchmarks.experiment.one", name, given.work),
        finished=lambda name: name in read_runs(),
        given=given,
    )


if __name__ == "__main__":
    main()
