"""Tables, curves and verdicts of the search for the front, from the runs that are finished.

    python -m benchmarks.front.report

Writes ``report.md``, ``summary.json`` and a plot per task beside the runs. A mean stands with its
standard deviation over the seeds.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.experiment.report import cell, mean
from benchmarks.front.runs import (
    PLAN,
    RESULTS,
    chosen,
    chosen_lr,
    continual,
    known,
    sweep,
    wanted_score,
)
from benchmarks.front.verdicts import finished, verdicts

_MEASURES = ("score", "kl", "kl_served", "perplexity_ratio", "unchanged", "still_right")


def _value(run: dict[str, Any], measure: str) -> float:
    found = run[measure]
    return float(found["accuracy"] if isinstance(found, dict) else found)


def curves(task: str) -> dict[str, list[dict[str, Any]]]:
    """Return variant -> score and KL on the validation rows, by rising learning rate."""
    found = {}
    for variant in PLAN["variants"]:
        points = [
            {"lr": job.lr} | {key: job.result.get(key) for key in ("score", "kl", "kl_served")}
            for job in sweep(task, variant)
            if job.result
        ]
        if points:
            found[variant] = points
    return found


def measured(task: str) -> dict[str, Any]:
    """Return variant -> mean and spread of its test runs, for those that have any."""
    found = {}
    for variant in PLAN["variants"]:
        if runs := finished(task, variant):
            found[variant] = {
                "lr": chosen_lr(task, variant),
                "seeds": sorted(runs),
                **{m: mean([_value(run, m) for run in runs.values()]) for m in _MEASURES},
            }
    return found


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [" | ".join(row) for row in (head, ["---"] * len(head), *rows)]
    return "".join(f"| {line} |\n" for line in lines)


def sweep_table(task: str) -> str:
    """Return one line per variant: score / KL (KL as served) at each rate, the chosen one bold."""
    rows = []
    for variant, points in curves(task).items():
        chosen = chosen_lr(task, variant)
        cells = []
        for point in points:
            served = "" if point["kl_served"] is None else f" ({point['kl_served']:.4f})"
            text = f"{point['lr']:g}: {point['score']:.3f} / {point['kl']:.4f}{served}"
            cells.append(f"**{text}**" if point["lr"] == chosen else text)
        rows.append([variant, ", ".join(cells)])
    return _table(["variant", "learning rate: score / KL (as served)"], rows)


def test_table(task: str) -> str:
    """Return one line per variant with finished test runs."""
    rows = [
        [name, f"{row['lr']:g}", str(len(row["seeds"])), *(cell(row[m]) for m in _MEASURES)]
        for name, row in measured(task).items()
    ]
    head = ["variant", "lr", "seeds", "score", "KL", "KL served", "perplexity ×", "unchanged"]
    head += ["still right"]
    return _table(head, rows) if rows else ""


def _chosen_name(task: str, name: str) -> str:
    """Return a candidate's name, and of a choice which variant it was."""
    variant, _ = chosen(task, name) or (name, 0)
    return name if variant == name else f"{name}: {variant}"


def verdict_table() -> str:
    """Return one line per bar, candidate and task."""
    rows = []
    for v in verdicts():
        said = {True: "met", False: "not met", None: "open: seeds are missing"}[v.holds]
        low, high = v.score_interval
        separate = {True: "yes", False: "no", None: "–"}[v.apart]
        rows.append(
            [
                v.bar, _chosen_name(v.task, v.variant), v.task, v.peer, str(v.seeds),
                f"{v.score_difference:+.3f} [{low:+.3f}, {high:+.3f}]",
                f"{v.kl_ratio:.2f} (limit {v.limit:.3g})", separate, said,
            ]
        )  # fmt: skip
    head = ["bar", "variant", "task", "against", "seeds", "score difference [95 %]", "KL ratio"]
    return _table([*head, "KL intervals apart", "bar"], rows) if rows else ""


def sequence_table() -> str:
    """Return one line per finished sequence of tasks."""
    keys = ("average_accuracy", "backward_transfer", "forgetting", "kl")
    rows = [
        [job.variant, job.task, str(job.seed), *(f"{job.result[key]:.3f}" for key in keys)]
        for job in continual()
        if job.result is not None
    ]
    head = ["variant", "strategy", "seed", *(key.replace("_", " ") for key in keys)]
    return _table(head, rows) if rows else ""


def plot(task: str, file: Path) -> None:
    """Plot score against KL, one curve per variant; better is up and to the left."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 5.5))
    for number, (variant, points) in enumerate(curves(task).items()):
        kept = bool(PLAN["variants"][variant].get("retain"))
        axes.plot(
            [p["kl"] for p in points], [p["score"] for p in points], label=variant,
            marker="osD^vP*X<>hd"[number % 12], color=f"C{number % 10}",
            linestyle="--" if kept else "-", markerfacecolor="white" if kept else None,
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlabel("KL(base ‖ adapted) per token on neutral English, float32 (log)")
    axes.set_ylabel(f"score on the validation rows of {task}")
    axes.set_title("one seed; points of a curve: learning rates; dashed: with --retain", fontsize=8)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    plt.close(figure)


def markdown() -> str:
    """Return report.md."""
    jobs = known()
    left = sum(job.result is None for job in jobs)
    text = "# The front between learning and keeping\n\n"
    text += f"{len(jobs) - left} runs are finished, {left} of those known by now are not; "
    text += "test runs become known when a sweep is complete.\n"
    if table := verdict_table():
        text += f"\n## Bars\n\n{table}"
    for task in PLAN["tasks"]:
        if not curves(task):
            continue
        wanted = wanted_score(task)
        compared = f"; compared at {wanted:.3f}" if wanted is not None else ""
        text += f"\n## {task}\n\nValidation rows, one seed{compared}.\n\n{sweep_table(task)}"
        if table := test_table(task):
            text += f"\nTest rows, mean ± standard deviation over the seeds.\n\n{table}"
    if table := sequence_table():
        text += f"\n## Task after task: {PLAN['continual']['common']['tasks']}\n\n{table}"
    return text


def main() -> None:
    if not any(curves(task) for task in PLAN["tasks"]):
        raise SystemExit("no run is finished yet: python -m benchmarks.front.run")
    summary = {
        task: {"curves": curves(task), "tests": measured(task)}
        for task in PLAN["tasks"]
        if curves(task)
    }
    judged = [asdict(v) | {"level": v.level, "holds": v.holds} for v in verdicts()]
    text = json.dumps({"tasks": summary, "verdicts": judged}, indent=1)
    (RESULTS / "summary.json").write_text(text + "\n")
    for task in summary:
        plot(task, RESULTS / f"{task}.png")
    (RESULTS / "report.md").write_text(markdown())
    print(markdown())


if __name__ == "__main__":
    main()
