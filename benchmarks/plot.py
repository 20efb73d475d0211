"""Plots of what bench-serve and bench-step measured, beside their JSON.

python -m benchmarks.plot [benchmarks/results/serve.json] [benchmarks/results/step.json]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

RESULTS = Path(__file__).resolve().parent / "results"


def serve(report: dict[str, Any], file: Path) -> None:
    """Tokens a second against distinct adapters, one panel per scenario."""
    scenarios = list(dict.fromkeys(row["scenario"] for row in report["rows"]))
    figure, panels = plt.subplots(1, len(scenarios), figsize=(6 * len(scenarios), 4), squeeze=False)
    for axes, scenario in zip(panels[0], scenarios, strict=True):
        rows = [row for row in report["rows"] if row["scenario"] == scenario]
        for engine in dict.fromkeys(row["engine"] for row in rows):
            mine = [r for r in rows if r["engine"] == engine]
            points = sorted((r["adapters"], r["total_tok_s"]) for r in mine)
            axes.plot(*zip(*points, strict=True), "o-", label=engine)
        axes.set_xscale("symlog", base=2)
        axes.set_ylim(bottom=0)
        axes.set_title(f"{scenario}, {report['base']}")
        axes.set_xlabel("distinct adapters")
        axes.set_ylabel("tokens/s, in and out")
        axes.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=150)


def step(report: dict[str, Any], file: Path) -> None:
    """Cost of the adapter step as a share of the base GEMM, one panel per size."""
    sizes = sorted({row["size"] for row in report["rows"]})
    most = max(row["adapters"] for row in report["rows"])
    figure, panels = plt.subplots(1, len(sizes), figsize=(5 * len(sizes), 4), squeeze=False)
    for axes, size in zip(panels[0], sizes, strict=True):
        rows = [r for r in report["rows"] if r["size"] == size and r["adapters"] == most]
        for column, style in (("ours_us", "o-"), ("lora_us", "x--")):
            for rank in sorted({r["r"] for r in rows}):
                points = [
                    (r["tokens"], r[column] / r["base_gemm_us"])
                    for r in rows
                    if r["r"] == rank and column in r
                ]
                if points:
                    name = f"{column.removesuffix('_us')}, r={rank}"
                    axes.plot(*zip(*points, strict=True), style, label=name)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.axhline(0.05, color="grey", linewidth=0.5)
        axes.set_title(f"{size} x {size}, {most} adapters")
        axes.set_xlabel("tokens")
        axes.set_ylabel("of the base GEMM's time")
        axes.legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(file, dpi=150)


def main() -> None:
    files = [Path(name) for name in sys.argv[1:]]
    files = files or [f for n in ("serve", "step") if (f := RESULTS / f"{n}.json").exists()]
    for file in files:
        report = json.loads(file.read_text())
        draw = serve if "scenario" in report["rows"][0] else step
        draw(report, file.with_suffix(".png"))
        print(file.with_suffix(".png"))


if __name__ == "__main__":
    main()
