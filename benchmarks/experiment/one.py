"""One run of the experiment: train, measure, add its line to runs.jsonl. Started by run.py.

python -m benchmarks.experiment.one NAME WORK
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks._report import header
from benchmarks.experiment.run import PLAN, Job, continual, specs, tests, tuning
from benchmarks.experiment.runs import append_run
from secura_serve.evaluate import answers, load_task, neutral_texts, retention, wilson
from secura_serve.evaluate.run import KNOWLEDGE
from secura_serve.train.methods import PreparedModel
from secura_serve.train.run import Run, train
from secura_serve.train.settings import TrainConfig


def rows(task: str, split: str, file: Path, count: int | None = None) -> Path:
    """Write the rows of a task as JSONL and return the file."""
    pairs = load_task(task).rows(split)[:count]
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in pairs)
    file.write_text("".join(lines))
    return file


def config(job: Job, work: Path) -> dict[str, Any]:
    settings = PLAN["common"] | job.settings | {
        "base": PLAN["base"], "out": str(work / "out" / job.name), "learning_rate": job.lr,
        "seed": job.seed, "save_steps": 0, "overwrite": True,
    }  # fmt: skip
    if settings["method"] == "full":
        del settings["targets"]
    return settings


def accuracy(tuned: PreparedModel, task: str, split: str, count: int) -> dict[str, Any]:
    entry = load_task(task)
    pairs = entry.rows(split)[:count]
    said = answers(
        tuned.model, tuned.tokenizer, [p for p, _ in pairs], max_new_tokens=entry.max_new_tokens
    )
    share = wilson(entry.right(said, [c for _, c in pairs]))
    return {"score": share.accuracy, "interval": [share.low, share.high], "items": len(pairs)}


def base_of(
    tuned: PreparedModel, pristine: dict[str, Any]
) -> Callable[[], AbstractContextManager[Any]]:
    """A context in which the model is its base."""
    if tuned.config.method != "full":
        return tuned.model.disable_adapter

    @contextmanager
    def swapped() -> Iterator[None]:
        trained = {name: value.clone() for name, value in tuned.model.state_dict().items()}
        tuned.model.load_state_dict(pristine)
        yield
        tuned.model.load_state_dict(trained)

    return swapped


def knowledge(tuned: PreparedModel, without: Any) -> dict[str, Any]:
    """Compare the answers to general-knowledge questions before and after."""
    said: dict[bool, list[str]] = {True: [], False: []}
    right: dict[bool, list[bool]] = {True: [], False: []}

    def ask(after: bool) -> None:
        for name in KNOWLEDGE:
            task = load_task(name)
            pairs = task.rows("test")
            texts = answers(
                tuned.model, tuned.tokenizer, [p for p, _ in pairs],
                max_new_tokens=task.max_new_tokens,
            )  # fmt: skip
            said[after] += texts
            right[after] += task.right(texts, [c for _, c in pairs])

    with without():
        ask(False)
    fold(tuned)
    ask(True)
    unchanged = [a == b for a, b in zip(said[True], said[False], strict=True)]
    still = [now for now, then in zip(right[True], right[False], strict=True) if then]
    return {"unchanged": asdict(wilson(unchanged)), "still_right": asdict(wilson(still))}


def fold(tuned: PreparedModel) -> None:
    """Put W' in place where there is one: generation is faster, and the same."""
    if tuned.config.method != "full" and tuned.config.magnorm not in ("activation", "reference"):
        tuned.model.merge_adapter()


def single(job: Job, work: Path) -> dict[str, Any]:
    plan = PLAN["single"]
    data = rows(plan["task"], "train", work / "data" / f"{plan['task']}.{job.name}.jsonl")
    settings = TrainConfig(**config(job, work), data=str(data))
    pristine: dict[str, Any] = {}
    if settings.method == "full":
        from secura_serve.train.methods.base import load_base

        model, _, _ = load_base(settings.base, "float32", "cpu")
        pristine = model.state_dict()
    run: Run = train(settings)
    tuned = run.prepared
    facts: dict[str, Any] = {
        "trained_parameters": sum(p.numel() for p in tuned.model.parameters() if p.requires_grad),
        "train_loss": run.scores["train_loss"],
        "train_seconds": round(run.seconds, 1),
    }
    tuned.model.eval()
    if job.kind == "tune":
        fold(tuned)
        return facts | accuracy(tuned, plan["task"], "validation", plan["validation"])
    without = base_of(tuned, pristine)
    kept = retention(tuned.model, tuned.tokenizer, neutral_texts().texts, without=without)
    facts |= {"kl": kept.kl, "perplexity_ratio": kept.perplexity_ratio}
    facts |= knowledge(tuned, without)
    return facts | accuracy(tuned, plan["task"], "test", plan["test"])


def sequence(job: Job, work: Path) -> dict[str, Any]:
    from secura_serve.train.continual import train_sequence
    from secura_serve.train.continual.config import SequenceConfig

    plan, folder = PLAN["continual"], work / "data" / job.name
    for task in plan["tasks"]:
        rows(task, "train", folder / f"{task}.train.jsonl")
        rows(task, "test", folder / f"{task}.test.jsonl", plan["test"])
    replays = plan["common"] if job.strategy != "seq" else {
        key: value for key, value in plan["common"].items() if not key.startswith("replay")
    }  # fmt: skip
    settings = SequenceConfig(
        **(config(job, work) | replays), tasks=",".join(plan["tasks"]), tasks_dir=str(folder),
        strategy=job.strategy,
    )  # fmt: skip
    run, results = train_sequence(settings)
    model = run.prepared.model.eval()
    texts = neutral_texts().texts
    kept = retention(model, run.prepared.tokenizer, texts, without=base_of(run.prepared, {}))
    facts = {k: v for k, v in results.to_json().items() if k != "history"}
    facts |= results.summary() | {"matrix": results.matrix().rows}
    return facts | {"kl": kept.kl, "perplexity_ratio": kept.perplexity_ratio}


def main() -> None:
    name, work = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    known = [job for variant in specs() for job in [*tuning(variant), *tests(variant)]]
    job = next(job for job in [*known, *continual()] if job.name == name)
    facts = {"name": name, "variant": job.variant, "kind": job.kind, "lr": job.lr}
    facts |= {"seed": job.seed, "strategy": job.strategy, "settings": job.settings}
    facts |= header(("torch", "transformers", "peft"))
    facts |= sequence(job, work) if job.kind == "continual" else single(job, work)
    shutil.rmtree(work / "out" / name, ignore_errors=True)
    append_run(facts)
    shown = ("score", "average_accuracy", "kl", "train_seconds")
    print(json.dumps({key: facts[key] for key in shown if isinstance(facts.get(key), float)}))


if __name__ == "__main__":
    main()
