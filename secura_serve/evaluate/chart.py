"""``report.png``: accuracies with their intervals, and what was kept."""

from __future__ import annotations

from importlib import util
from pathlib import Path
from typing import Any

__all__ = ["draw", "missing"]


def missing() -> str | None:
    """Say why no chart can be drawn here, if so."""
    return None if util.find_spec("matplotlib") else "pip install 'secura-serve[eval]'"


def draw(facts: dict[str, Any], file: Path) -> None:
    """Draw groups of bars, one per task or share, one bar per model; 95 % intervals.

    Metrics of the harness are drawn where they are shares of right answers.
    """
    # Not pyplot, which would choose a window system and keep the figure.
    from matplotlib.figure import Figure

    models = facts["models"]
    groups = {name: {m: _bar(t["scores"][m]) for m in models} for name, t in facts["tasks"].items()}
    for name, task in facts["harness"].items():
        for metric in next(iter(task["scores"].values()))["metrics"]:
            if metric.split(" ")[0] in ("acc", "exact_match", "f1"):
                values = {m: task["scores"][m]["metrics"][metric] for m in models}
                groups[f"{name}\n{metric}"] = {
                    m: (v["value"], 1.96 * (v["stderr"] or 0), 1.96 * (v["stderr"] or 0))
                    for m, v in values.items()
                }
    kept = facts["retention"].get("models", {})
    for key, title in (
        ("answers_unchanged", "answers\nunchanged"),
        ("still_right", "still\nright"),
    ):
        if any(r[key] for r in kept.values()):
            groups[title] = {m: _bar(r[key]) for m, r in kept.items() if r[key]}
    figure = Figure(figsize=(max(6.0, 1.2 + 1.5 * len(groups)), 4.2), layout="constrained")
    axes = figure.add_subplot()
    width = 0.8 / len(models)
    for i, model in enumerate(models):
        drawn = [(at, bars[model]) for at, bars in enumerate(groups.values()) if model in bars]
        at = [x + (i - (len(models) - 1) / 2) * width for x, _ in drawn]
        axes.bar(
            at,
            [value for _, (value, _, _) in drawn],
            width,
            yerr=[[low for _, (_, low, _) in drawn], [high for _, (_, _, high) in drawn]],
            capsize=3,
            label=model,
            error_kw={"elinewidth": 1},
        )
    axes.set_xticks(range(len(groups)), list(groups), fontsize=8)
    axes.set_ylim(0, 1)
    axes.set_ylabel("share, 95 % interval")
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    figure.legend(loc="outside upper center", ncols=min(len(models), 4), fontsize=8)
    figure.savefig(file, dpi=150)


def _bar(interval: dict[str, Any]) -> tuple[float, float, float]:
    p = interval["accuracy"]
    return p, p - interval["low"], interval["high"] - p
