"""Tables and plots of the experiment, from the runs that are finished.

    python -m benchmarks.experiment.report

Writes ``report.md``, ``summary.json``, ``pareto.png`` and ``dial.png`` beside the results. A mean
stands with its standard deviation over the seeds; a claim is judged by 95 % intervals of Student's
t over the seeds, as plan.yaml fixed it before the first run.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from benchmarks.experiment.run import PLAN, chosen_lr, continual, specs, tests, tuning
from benchmarks.experiment.runs import RESULTS

# Student's t, two-sided 95 %, by degrees of freedom (two seeds to six).
STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571}
LOWEST_DRAWN = 0.5
MEASURES = {
    "score": lambda r: r["score"],
    "kl": lambda r: r["kl"],
    "perplexity_ratio": lambda r: r["perplexity_ratio"],
    "unchanged": lambda r: r["unchanged"]["accuracy"],
    "still_right": lambda r: r["still_right"]["accuracy"],
}


def mean(values: list[float]) -> dict[str, Any]:
    """Return mean, standard deviation and 95 % interval; one value has only itself."""
    middle = statistics.mean(values)
    if len(values) < 2:
        return {"mean": middle, "sd": None, "interval": None, "n": 1}
    sd = statistics.stdev(values)
    reach = STUDENT[len(values) - 1] * sd / len(values) ** 0.5
    return {
        "mean": middle,
        "sd": sd,
        "interval": [middle - reach, middle + reach],
        "n": len(values),
    }


def single() -> dict[str, Any]:
    """Return variant -> what its test runs measured, for those that have any."""
    measured: dict[str, Any] = {}
    for variant in specs():
        runs = [job.result for job in tests(variant) if job.result is not None]
        if not runs:
            continue
        tried = {f"{job.lr:g}": job.result["score"] for job in tuning(variant) if job.result}
        measured[variant] = {
            "lr": chosen_lr(variant),
            "validation_score_by_lr": tried,
            "trained_parameters": runs[0]["trained_parameters"],
            **{name: mean([of(r) for r in runs]) for name, of in MEASURES.items()},
        }
    return measured


def _apart(one: dict[str, Any], other: dict[str, Any]) -> bool:
    if one["interval"] is None or other["interval"] is None:
        return False
    return one["interval"][1] < other["interval"][0] or other["interval"][1] < one["interval"][0]


def claims(measured: dict[str, Any]) -> dict[str, Any]:
    """Judge whether each variant keeps more than LoRA and DoRA at matched score.

    Of LoRA's KL it may have a third; DoRA's must only be larger.
    """
    judged: dict[str, Any] = {}
    for name, row in measured.items():
        for peer in ("lora", "dora"):
            if name in ("lora", "dora") or peer not in measured or row["score"]["n"] < 2:
                continue
            base = measured[peer]
            matched = row["score"]["mean"] >= base["score"]["mean"] - (base["score"]["sd"] or 0)
            ratio = row["kl"]["mean"] / base["kl"]["mean"]
            less = ratio <= 1 / 3 if peer == "lora" else ratio < 1
            more = row["unchanged"]["mean"] > base["unchanged"]["mean"]
            apart = _apart(row["kl"], base["kl"]) and _apart(row["unchanged"], base["unchanged"])
            judged[f"{name} against {peer}"] = {
                "matched_score": matched,
                "kl_ratio": ratio,
                "kl_low_enough": less,
                "more_unchanged": more,
                "intervals_apart": apart,
                "holds": matched and less and more and apart,
            }
    return judged


def cell(measured: dict[str, Any]) -> str:
    return f"{measured['mean']:.3f}" + (
        f" ± {measured['sd']:.3f}" if measured["sd"] is not None else ""
    )


def table(measured: dict[str, Any]) -> str:
    head = ["variant", "lr", "trained", "seeds"]
    head += ["score", "KL", "perplexity ×", "unchanged", "still right"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, row in measured.items():
        cells = [name, f"{row['lr']:g}", f"{row['trained_parameters']:,}", str(row["score"]["n"])]
        cells += [cell(row[measure]) for measure in MEASURES]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def verdicts(judged: dict[str, Any]) -> str:
    """Return the claim's four conditions, which all must hold."""
    head = ["variant", "against", "score level", "KL ratio", "low enough", "more unchanged"]
    head += ["intervals apart", "claim"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, facts in judged.items():
        variant, _, peer = name.partition(" against ")
        keys = ("matched_score", "kl_low_enough", "more_unchanged", "intervals_apart", "holds")
        said = ["yes" if facts[key] else "no" for key in keys]
        cells = [variant, peer, said[0], f"{facts['kl_ratio']:.2f}", *said[1:]]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def sequences() -> str:
    keys = ("average_accuracy", "backward_transfer", "forgetting", "kl", "perplexity_ratio")
    lines = [f"| variant | strategy | {' | '.join(keys)} |", "|---" * (2 + len(keys)) + "|"]
    for job in continual():
        if job.result is not None:
            cells = " | ".join(f"{job.result[key]:.3f}" for key in keys)
            lines.append(f"| {job.variant} | {job.strategy} | {cells} |")
    return "\n".join(lines) + "\n" if len(lines) > 2 else ""


def _family(name: str) -> tuple[str, str]:
    """Return what shares a colour in the plots, and what tells its points apart."""
    prefix, bounded, tau = name.partition("bounded-")
    if bounded:
        return f"{prefix}bounded", f"τ {tau}"
    return name.removesuffix("-slower"), "slower" if name.endswith("-slower") else ""


def pareto(measured: dict[str, Any], file: Path, only: str = "") -> None:
    """Plot task score against KL to the base; better is up and to the left."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 5.5))
    seen: dict[str, int] = {}
    outside = []
    for name, row in measured.items():
        if only and only not in name and name != "lora":
            continue
        kl, score = row["kl"]["mean"], row["score"]["mean"]
        if score < LOWEST_DRAWN:
            outside.append(f"{name} ({score:.3f} at {kl:.1f})")
            continue
        family, note = _family(name)
        first = family not in seen
        number = seen.setdefault(family, len(seen))
        axes.errorbar(
            kl, score, xerr=row["kl"]["sd"] or 0, yerr=row["score"]["sd"] or 0, capsize=3,
            fmt="osD^vP*X<>h"[number], color=f"C{number}",
            mfc="white" if note == "slower" else None, label=family if first else None,
        )  # fmt: skip
        if note.startswith("τ"):
            offset = (3, 4 if family.startswith("cabr") else -11)
            axes.annotate(note, (kl, score), offset, textcoords="offset points", fontsize=7)
    axes.set_xscale("log")
    axes.set_xlabel("KL(base ‖ adapted) per token on neutral English (log)")
    axes.set_ylabel(f"score on {PLAN['single']['task']}")
    axes.set_title(
        "mean and standard deviation over the seeds; hollow: a smaller learning rate"
        + (f"\nbelow the frame: {', '.join(outside)}" if outside else ""),
        fontsize=8,
    )
    axes.legend(fontsize=8, loc="lower right")
    figure.tight_layout()
    figure.savefig(file, dpi=150)
    plt.close(figure)


def markdown(measured: dict[str, Any], judged: dict[str, Any]) -> str:
    """Return report.md."""
    waiting = sum(job.result is None for name in specs() for job in tests(name))
    so_far = f" so far, {waiting} single-task runs missing" if waiting else ""
    text = f"# Results{so_far}\n\n{table(measured)}\n"
    text += "## Keeps more at matched score?\n\n"
    text += "Low enough: at most a third of LoRA's KL; less than DoRA's. Apart: the 95 % intervals "
    text += f"of KL and of unchanged answers.\n\n{verdicts(judged)}"
    if rows := sequences():
        text += f"\n## Task after task: {', '.join(PLAN['continual']['tasks'])}\n\n{rows}"
    return text


def main() -> None:
    measured = single()
    if not measured:
        raise SystemExit("no test run is finished yet: python -m benchmarks.experiment.run")
    judged = claims(measured)
    (RESULTS / "summary.json").write_text(
        json.dumps({"single": measured, "claims": judged}, indent=1) + "\n"
    )
    pareto(measured, RESULTS / "pareto.png")
    pareto(measured, RESULTS / "dial.png", only="bounded")
    text = markdown(measured, judged)
    (RESULTS / "report.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
