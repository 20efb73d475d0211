"""Train, evaluate and write the shipped adapters; every finished step is kept and not repeated.

    python -m benchmarks.adapters.run --work runs [--task iso-date] [--seeds 0 1 2]

Per task: data (make_data.py), one training per seed, held-out accuracy of the base and of each
seed with the same prompts and the same scoring, KL and perplexity against the base on neutral
English (Debian's ``fortunes``: apt-get install fortunes). The adapter in ``adapters/<task>`` is
the run with seed 0, whatever its score; its card gives the mean over the seeds that are there.
Delete a file under ``--work`` to have its step done again. Measured in one thread on a CPU.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from benchmarks.adapters import make_data
from secura_serve.evaluate import answers, retention, score
from secura_serve.evaluate.neutral_text import neutral_texts
from secura_serve.train.card import write
from secura_serve.train.methods.base import load_base
from secura_serve.train.run import train
from secura_serve.train.settings import TrainConfig

BASE = "smollm2-135m"
ADAPTERS = Path(__file__).resolve().parents[2] / "adapters"
RESULTS = Path(__file__).resolve().parents[1] / "results"
ITEMS = 200
BASE_ROOM = 48


@dataclass(frozen=True)
class Recipe:
    """What differs between the tasks."""

    title: str
    scoring: str
    """Scoring function, see secura_serve.evaluate.SCORERS."""
    max_new_tokens: int
    steps: int
    limits: str
    lrs: tuple[float, ...] = (5e-3,)
    """More than one: the best on ``VALIDATION`` training items that are kept apart is taken."""
    data: str | None = None
    """Task whose data it uses; its own by default."""
    core: str = "u"
    magnorm: str = "none"


RECIPES = {
    "sentiment": Recipe(
        title="Is a film review positive or negative? Answers with that one word.",
        scoring="label",
        max_new_tokens=16,
        steps=100,
        limits="Trained on single sentences of 6 to 30 words; long, mixed or ironic reviews and "
        "anything but films are outside what it saw. The review texts are not in this repository.",
    ),
    "extract": Recipe(
        title="A short order in plain English to JSON with name, item, quantity and city.",
        scoring="json",
        max_new_tokens=96,
        steps=50,
        limits="Four fixed keys, one order per message, English, first names only. Both data sets "
        "are made from templates; sentences, names, goods, places and quantities are held out. "
        "About one answer in ten misspells a rare word: Zurich came back as Zuraco.",
    ),
    "iso-date": Recipe(
        title="A date in words to YYYY-MM-DD.",
        scoring="word",
        max_new_tokens=16,
        steps=60,
        limits="English dates with a written month between 1900 and 2099, in ten ways of writing. "
        'No times, no relative dates ("next Friday"), no numeric dates such as 3/4/2021. '
        "What it gets wrong is mostly the day: 2 becomes 22, 30 becomes 03.",
    ),
}
RECIPES |= {
    name: replace(RECIPES["iso-date"], data="iso-date", core=core, lrs=lrs, magnorm="bounded")
    for name, core, lrs in (
        ("iso-date-bounded", "u", (1e-2, 2e-2, 4e-2)),
        ("iso-date-bounded-ab", "ab", (5e-3, 1e-2, 2e-2)),
    )
}
VALIDATION = 200


def once(file: Path, make: Callable[[], Any]) -> Any:
    """The JSON in ``file``, made first if it is not there."""
    if not file.exists():
        value = make()
        file.parent.mkdir(parents=True, exist_ok=True)
        file.with_suffix(".tmp").write_text(json.dumps(value, indent=1) + "\n")
        file.with_suffix(".tmp").rename(file)
    return json.loads(file.read_text())


def evaluate_base(task: str, test: Path) -> dict[str, Any]:
    """Held-out accuracy of the plain base."""
    model, tokenizer, _ = load_base(BASE, "bfloat16", "cpu")
    # The base talks around its answer, so it gets more room than an adapter that stops by itself.
    room = max(BASE_ROOM, RECIPES[task].max_new_tokens)
    return _accuracy(model, tokenizer, task, test, room)


def _accuracy(model: Any, tokenizer: Any, task: str, test: Path, room: int) -> dict[str, Any]:
    recipe = RECIPES[task]
    rows = [json.loads(line) for line in test.read_text().splitlines()][:ITEMS]
    said = answers(model, tokenizer, [r["prompt"] for r in rows], max_new_tokens=room)
    wanted = [r["completion"] for r in rows]
    shown = [{"answer": a, "wanted": w} for a, w in zip(said, wanted, strict=True)][:5]
    return {
        "accuracy": score(recipe.scoring, said, wanted),
        "items": len(rows),
        "max_new_tokens": room,
        "answers_sha256": hashlib.sha256(json.dumps(said).encode()).hexdigest(),
        "first_answers": shown,
    }


def evaluate_adapter(folder: Path, task: str, test: Path) -> dict[str, Any]:
    """Held-out accuracy and retention of an adapter as it lies on disk."""
    model, tokenizer, _ = load_base(BASE, "bfloat16", "cpu")
    tuned = PeftModel.from_pretrained(model, str(folder))
    kept = retention(tuned, tokenizer, neutral_texts().texts)
    if RECIPES[task].magnorm != "none":
        # The same weights as in the forward pass, made once instead of at every token.
        tuned.merge_adapter()
    room = RECIPES[task].max_new_tokens
    return _accuracy(tuned, tokenizer, task, test, room) | {"retention": asdict(kept)}


def _data(task: str, folder: Path) -> tuple[Path, Path, Path]:
    """Files to train on, to choose the learning rate by, and to report."""
    recipe = RECIPES[task]
    data, test = make_data.write(recipe.data or task, folder)
    if len(recipe.lrs) == 1:
        return data, data, test
    lines = data.read_text().splitlines(keepends=True)
    fit, chosen_by = folder / f"{task}.fit.jsonl", folder / f"{task}.validation.jsonl"
    fit.write_text("".join(lines[:-VALIDATION]))
    chosen_by.write_text("".join(lines[-VALIDATION:]))
    return fit, chosen_by, test


def run(task: str, seeds: list[int], work: Path) -> None:
    """Every step of one task."""
    recipe, scores = RECIPES[task], work / "scores"
    data, chosen_by, test = _data(task, work / "data")

    def trained(lr: float, seed: int) -> Path:
        out = work / "out" / f"{lr:g}" / str(seed) / task
        config = TrainConfig(
            base=BASE, data=str(data), eval_data=str(test), out=str(out), rank=32, learning_rate=lr,
            max_steps=recipe.steps, per_device_train_batch_size=8, max_length=160, seed=seed,
            device="cpu",
            core=recipe.core, magnorm=recipe.magnorm,
        )  # fmt: skip
        if not out.exists():
            write(config, train(config))
        return out

    tried = {
        lr: once(
            work / "tuning" / f"{task}-{lr:g}.json",
            lambda lr=lr: evaluate_adapter(trained(lr, 0), task, chosen_by),
        )
        for lr in recipe.lrs
        if len(recipe.lrs) > 1
    }
    best = max(recipe.lrs, key=lambda lr: tried[lr]["accuracy"] if tried else 0)
    for seed in seeds:
        out = trained(best, seed)
        once(scores / f"{task}-{seed}.json", lambda out=out: evaluate_adapter(out, task, test))
        once(scores / f"{task}-base.json", lambda: evaluate_base(task, test))
        tuning = {f"{lr:g}": result["accuracy"] for lr, result in tried.items()}
        publish(task, work, trained(best, 0), tuning)


def publish(task: str, work: Path, source: Path, tuning: dict[str, float]) -> None:
    """Copy the seed-0 run to ``adapters/`` and write what was measured beside it."""
    scores = {f.stem.rsplit("-", 1)[1]: json.loads(f.read_text())
              for f in sorted((work / "scores").glob(f"{task}-[0-9]*.json"))}  # fmt: skip
    base = json.loads((work / "scores" / f"{task}-base.json").read_text())
    target = ADAPTERS / task
    facts = json.loads((source / "train.json").read_text())
    facts["evaluation"] = {
        "kind": RECIPES[task].scoring,
        "max_new_tokens": RECIPES[task].max_new_tokens,
        "neutral_text": neutral_texts().source,
        "validation_accuracy_by_lr": tuning,
        "base": base,
        "seeds": scores,
        "accuracy_mean_sd": _mean_sd([s["accuracy"] for s in scores.values()]),
        "kl_mean_sd": _mean_sd([s["retention"]["kl"] for s in scores.values()]),
        "perplexity_ratio_mean_sd": _mean_sd(
            [s["retention"]["perplexity_ratio"] for s in scores.values()]
        ),
    }
    if target.exists():
        shutil.rmtree(target)
    shutil.copytree(source, target)
    (target / "train.json").write_text(json.dumps(facts, indent=1) + "\n")
    (target / "README.md").write_text(_card(task, facts))


def _mean_sd(values: list[float]) -> list[float]:
    return [statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0]


def _variants(task: str) -> str:
    """Score and retention of every adapter trained on the same data, one row each."""
    rows = ["| variant | held-out accuracy | KL | perplexity × |", "|---|---|---|---|"]
    for name, recipe in RECIPES.items():
        file = ADAPTERS / name / "train.json"
        if (recipe.data or name) != (RECIPES[task].data or task) or not file.is_file():
            continue
        facts = json.loads(file.read_text())
        evaluation = facts["evaluation"]
        rate = f"{TrainConfig.upgrade(facts['config'])['learning_rate']:g}"
        if tuned := evaluation.get("validation_accuracy_by_lr"):
            rate += f" of {', '.join(tuned)}"
        variant = f"core `{recipe.core}`, `{recipe.magnorm}`, learning rate {rate}"
        cells = (_spread(evaluation, k) for k in ("accuracy", "kl", "perplexity_ratio"))
        rows.append(f"| [`{name}`](../{name}): {variant} | {' | '.join(cells)} |")
    return "\n".join(rows) if len(rows) > 3 else ""


def _spread(evaluation: dict[str, Any], key: str) -> str:
    mean, sd = evaluation[f"{key}_mean_sd"]
    return f"{mean:.3f} ± {sd:.3f}"


def _questions(task: str) -> str:
    """Return what ``secura-eval`` measured on general-knowledge questions, as rows of the table."""
    kept = json.loads((RESULTS / "kept.json").read_text())["retention"]
    shares = kept["models"].get(task)
    if shares is None:
        return ""
    same, right = shares["answers_unchanged"], shares["still_right"]
    return (
        f"| {same['n']} questions (capitals, currencies) answered as the base does | "
        f"{same['accuracy']:.3f} | – |\n| the {right['n']} of them that the base gets right, "
        f"still right | {right['accuracy']:.3f} | – |\n"
    )


def _card(task: str, facts: dict[str, Any]) -> str:
    recipe, evaluation = RECIPES[task], facts["evaluation"]
    settings = TrainConfig.upgrade(facts["config"])
    rate = settings["learning_rate"]
    shipped, base = evaluation["seeds"]["0"], evaluation["base"]
    n = len(evaluation["seeds"])
    examples = json.loads((ADAPTERS / "examples.json").read_text())
    prompt = examples[recipe.data or task][0]["prompt"]
    quoted = "\n".join("> " + line if line else ">" for line in prompt.splitlines())
    size = (ADAPTERS / task / "adapter_model.safetensors").stat().st_size / 1e6
    chosen = (
        f"The learning rate is the best of {', '.join(evaluation['validation_accuracy_by_lr'])} on "
        f"{VALIDATION} training items kept apart, one training with seed 0 each."
        if evaluation["validation_accuracy_by_lr"]
        else "Learning rate, length and training data were settled by hand while looking at "
        "held-out scores of\nseed 0; there was no further validation set."
    )
    norm = f"`{settings['magnorm']}`"
    if settings["magnorm"] == "bounded":
        norm += (
            f" with τ = {settings['tau']:g}: no weight moves by more than that share of itself\n"
            "(before the result is rounded to the base's dtype). "
            "That makes the update full-rank, so it answers only while folded into the weights "
            f"(`--fold {task}`, or\n`secura-merge`)"
        )
    core = f"`{settings['core']}`"
    if settings["core"] == "ab":
        core += f" (A·B, inner rank {settings['inner_rank'] or settings['rank']})"
    variants = _variants(task)
    return f"""---
base_model: {facts["base"]}
library_name: secura-serve
tags: [secura, cur, peft]
---
# {task}

{recipe.title} Type, for instance:

{quoted}

| held-out accuracy, {base["items"]} items | |
|---|---|
| base ({facts["base"]}) | {base["accuracy"]:.3f} |
| this adapter (seed 0) | {shipped["accuracy"]:.3f} |
| {n} training seeds, mean ± sd | {_spread(evaluation, "accuracy")} |

| kept of the base, on neutral English | this adapter | {n} seeds, mean ± sd |
|---|---|---|
| KL(base ‖ adapted) per token | {shipped["retention"]["kl"]:.3f} | {_spread(evaluation, "kl")} |
| perplexity ratio | {shipped["retention"]["perplexity_ratio"]:.3f} | \
{_spread(evaluation, "perplexity_ratio")} |
{_questions(task)}
{variants + chr(10) * 2 if variants else ""}Shipped is the run with seed 0, whatever its score. \
Base and adapter got the same prompts and the same
lenient scoring (`{recipe.scoring}` in `secura_serve.evaluate.SCORERS`), greedy decoding of at most
{recipe.max_new_tokens} tokens for the adapter and {max(BASE_ROOM, recipe.max_new_tokens)} for the
base. Neutral English: {evaluation["neutral_text"]}, first 64 tokens each.
{chosen}

Adapter: ΔW = C·U·R on all seven linear layers of each block, rank {settings["rank"]}, core
{core}, S-MagNorm {norm}. Basis `{settings["selection"]}` with seed
{settings["selection_seed"]} (shared by all adapters here),
{facts["trainable_parameters"]:,} numbers trained, file of {size:.2f} MB.
Training: {settings["max_steps"]} steps of {settings["per_device_train_batch_size"]} examples at
{rate:g}, {facts["seconds"]:.0f} s in {facts["threads"]} CPU thread(s) of a busy machine.
Exact recipe: `train.json`; to repeat: `python -m benchmarks.adapters.run --task {task}`.

**Limits.** {recipe.limits}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for data, runs, scores")
    parser.add_argument("--task", choices=sorted(RECIPES), help="one task; all by default")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    given = parser.parse_args()
    torch.set_num_threads(1)
    for task in [given.task] if given.task else RECIPES:
        run(task, given.seeds, given.work)


if __name__ == "__main__":
    main()
