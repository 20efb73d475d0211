"""One run of the experiment: train, measure, add its line to runs.jsonl. Started by run.py.

python -m benchmarks.front.one NAME WORK
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks._report import header
from benchmarks.experiment.one import rows
from benchmarks.experiment.runs import append_run
from benchmarks.front.base import Base
from benchmarks.front.corda import train_corda
from benchmarks.front.natural_lora import train_natural_lora
from benchmarks.front.questions import ROOM, right
from benchmarks.front.runs import FILE, PLAN, Job, known
from secura_serve.evaluate import answers, load_task, wilson
from secura_serve.train import SecuraLayer
from secura_serve.train.continual import train_sequence
from secura_serve.train.continual.config import SequenceConfig
from secura_serve.train.methods import PreparedModel
from secura_serve.train.methods.base import load_base
from secura_serve.train.run import Run, train
from secura_serve.train.settings import TrainConfig

TRAINERS: dict[str, Callable[[TrainConfig], Run]] = {
    "corda": train_corda,
    "natural-lora": partial(train_natural_lora, damping=0.01),
}
"""Methods of the plan that are a LoRA which starts elsewhere or is trained otherwise."""


def settings_of(job: Job, work: Path) -> dict[str, Any]:
    """Return the training settings of a run, without its data."""
    more = {"method": "lora"} if job.settings["method"] in TRAINERS else {}
    return job.settings | more | {
        "base": PLAN["base"], "out": str(work / "out" / job.name), "learning_rate": job.lr,
        "seed": job.seed, "save_steps": 0, "overwrite": True,
    }  # fmt: skip


def settings(job: Job, work: Path, data: Path) -> TrainConfig:
    """Return the training settings of a run on one task."""
    return TrainConfig(**settings_of(job, work), data=str(data))


def measure(tuned: PreparedModel, base: Base, job: Job) -> dict[str, Any]:
    """Measure score and KL, of test runs also the questions; the model is in float32 after this.

    Everything but ``kl_served`` is measured in float32, whatever the run was trained in.
    """
    model, tokenizer = tuned.model.eval(), tuned.tokenizer
    begin = time.monotonic()
    facts: dict[str, Any] = {}
    if job.kind == "test":
        with served(model):
            facts["kl_served"] = base.drift(model).kl
    model.float()
    facts |= asdict(base.drift(model))
    if hasattr(model, "merge_adapter"):
        # Generation is faster, and in float32 the same.
        model.merge_adapter()
    split = "validation" if job.kind == "sweep" else "test"
    task = load_task(job.task)
    pairs = task.rows(split)
    said = answers(
        model, tokenizer, [p for p, _ in pairs], max_new_tokens=task.max_new_tokens, batch_size=50
    )
    correct = task.right(said, [c for _, c in pairs])
    facts |= {"score": wilson(correct).accuracy, "right": "".join(map(str, map(int, correct)))}
    if job.kind == "test":
        facts |= knowledge(model, tokenizer, base)
    return facts | {"measure_seconds": round(time.monotonic() - begin, 1)}


@contextmanager
def served(model: Any) -> Iterator[None]:
    """Compute in bfloat16 throughout, as a server does: what is trained is rounded to it, too.

    A core is rounded once it is multiplied out; of a LoRA A and B are. A base that the method has
    rewritten, so that bfloat16 does not hold it, stays in float32.
    """
    lora = {p: p.data for name, p in model.named_parameters() if ".lora_" in name}
    base = {p: p.data for p in model.parameters() if not p.requires_grad}
    if not all(torch.equal(value, value.bfloat16().to(value.dtype)) for value in base.values()):
        base = {}
    layers = [m for m in model.modules() if isinstance(m, SecuraLayer)]
    try:
        for parameter, value in lora.items():
            parameter.data = value.bfloat16().to(value.dtype)
        for parameter, value in base.items():
            parameter.data = value.bfloat16()
        for layer in layers:
            layer.core = _rounded(layer.core)  # type: ignore[method-assign]
        yield
    finally:
        for parameter, value in (lora | base).items():
            parameter.data = value
        for layer in layers:
            del layer.core


def _rounded(core: Callable[[str], Tensor]) -> Callable[[str], Tensor]:
    return lambda name: core(name).bfloat16().float()


def knowledge(model: Any, tokenizer: Any, base: Base) -> dict[str, Any]:
    """Ask what the base answers rightly: is it still right, is it word for word the same?"""
    known_to_base = base.knows()
    said = answers(model, tokenizer, [q.text for q, _ in known_to_base], max_new_tokens=ROOM)
    still = [right(q, text) for (q, _), text in zip(known_to_base, said, strict=True)]
    same = [text == before for (_, before), text in zip(known_to_base, said, strict=True)]
    return {"still_right": asdict(wilson(still)), "unchanged": asdict(wilson(same))}


def single(job: Job, work: Path) -> dict[str, Any]:
    """Train on one task and measure."""
    data = rows(job.task, "train", work / "data" / f"{job.task}.{job.name}.jsonl")
    config = settings(job, work, data)
    run = TRAINERS.get(job.settings["method"], train)(config)
    data.unlink()
    tuned = run.prepared
    facts: dict[str, Any] = {
        "trained_parameters": tuned.trainable_parameters,
        "train_loss": run.scores["train_loss"],
        "train_seconds": round(run.seconds, 1),
    }
    return facts | measure(tuned, the_base(tuned, work), job)


def sequence(job: Job, work: Path) -> dict[str, Any]:
    """Train on one task after another and measure."""
    plan, folder = PLAN["continual"], work / "data" / job.name
    for task in plan["common"]["tasks"].split(","):
        rows(task, "train", folder / f"{task}.train.jsonl")
        rows(task, "test", folder / f"{task}.test.jsonl", plan["test"])
    config = SequenceConfig(**settings_of(job, work), tasks_dir=str(folder))
    run, results = train_sequence(config)
    shutil.rmtree(folder)
    facts = {k: v for k, v in results.to_json().items() if k != "history"}
    facts |= results.summary() | {"matrix": results.matrix().rows}
    facts |= {"train_seconds": round(run.seconds, 1)}
    model = run.prepared.model.eval().float()
    base = the_base(run.prepared, work)
    facts |= asdict(base.drift(model))
    model.merge_adapter()
    return facts | knowledge(model, run.prepared.tokenizer, base)


def the_base(tuned: PreparedModel, work: Path) -> Base:
    """Return what the base says; where it is not kept yet, the base is loaded beside the model."""
    return Base(
        lambda: load_base(PLAN["base"], "float32", tuned.config.device)[0].eval(),
        tuned.tokenizer,
        f"{tuned.model_id} {tuned.model.device.type}",
        work / "base",
    )


def main() -> None:
    name, work = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    job = next(job for job in known() if job.name == name)
    facts: dict[str, Any] = asdict(job)
    facts |= header(("torch", "transformers", "peft"))
    facts["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    facts |= sequence(job, work) if job.kind == "continual" else single(job, work)
    shutil.rmtree(work / "out" / name, ignore_errors=True)
    append_run(facts, FILE)
    shown = ("score", "average_accuracy", "kl", "train_seconds", "measure_seconds")
    print(json.dumps({key: facts[key] for key in shown if key in facts}))


if __name__ == "__main__":
    main()
