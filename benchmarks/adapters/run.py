"""Train, evaluate and write the shipped adapters; every finished step is kept and not repeated.

    python -m benchmarks.adapters.run --work runs [--task iso-date] [--seeds 0 1 2]

Per recipe: data (make_data.py), the learning rate, one training per seed, held-out accuracy of the
base and of each seed with the same prompts and the same scoring, KL and perplexity against the base
on neutral English (Debian's ``fortunes``), and the share of general-knowledge questions that the
base gets right and the adapter does too (:mod:`benchmarks.front.questions`, Debian's
``wordnet-base``). The adapter in ``adapters/<recipe>`` is the run with seed 0, whatever its score;
its card gives the mean over the seeds that are there. What the recipes of ``NOT_SHIPPED`` give, the
one of before and those that have not proved better, stays below ``--work``. Delete a file under
``--work`` to have its step done again. Measured in one thread on a CPU.
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

from benchmarks._report import header
from benchmarks.adapters import make_data
from benchmarks.front.base import Base
from benchmarks.front.one import knowledge
from secura_serve.evaluate import answers, retention, score
from secura_serve.evaluate.neutral_text import neutral_texts
from secura_serve.train.methods.base import load_base
from secura_serve.train.output.card import write
from secura_serve.train.run import train
from secura_serve.train.settings import TrainConfig

BASE = "smollm2-135m"
ADAPTERS = Path(__file__).resolve().parents[2] / "adapters"
FIGURES = Path(__file__).resolve().parents[1] / "results" / "adapters.json"
"""What was measured of every recipe, shipped or not."""
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
    """One, or several to choose from on training items that are kept apart, see :func:`chosen`."""
    validation: int = 200
    """How many are kept apart."""
    margin: float = 0.01
    """How much accuracy a rate of less KL may cost."""
    data: str | None = None
    """Task whose data it uses; its own by default."""
    core: str = "u"
    inner_rank: int | None = None
    magnorm: str = "none"
    coordinates: str = "plain"
    retain: float = 0.0
    dtype: str = "bfloat16"
    """Of the base in training."""


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
        "About one answer in ten has a wrong value.",
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
    name: replace(
        RECIPES["iso-date"], data="iso-date", core=core, lrs=lrs, magnorm="bounded", margin=0.0
    )
    for name, core, lrs in (
        ("iso-date-bounded", "u", (1e-2, 2e-2, 4e-2)),
        ("iso-date-bounded-ab", "ab", (5e-3, 1e-2, 2e-2)),
    )
}
NATURAL: dict[str, Any] = {"coordinates": "natural", "lrs": (1.5e-3, 3e-3, 6e-3, 1.2e-2)}
RECIPES |= {
    "iso-date-plain": replace(RECIPES["iso-date"], data="iso-date"),
    "iso-date": replace(RECIPES["iso-date"], **NATURAL),
    "sentiment-natural": replace(RECIPES["sentiment"], data="sentiment", **NATURAL),
}
# The weight that the sweep of benchmarks/front found to matter: with 1 the KL hardly fell. In
# float32, in which a KL of .001 is more than rounding, and which is twice as fast on this CPU.
KEPT: dict[str, Any] = NATURAL | {
    "retain": 10.0, "lrs": (3e-3, 6e-3, 1.2e-2), "dtype": "float32",
}  # fmt: skip
RECIPES |= {
    f"{task}-kept": replace(RECIPES[task], data=task, **KEPT) for task in ("iso-date", "sentiment")
}
# The rate is the one that benchmarks/front chose for extract on its validation rows. With an
# objective it copies fewer words from sentences of a new form; on rows kept apart, whose sentences
# are those of the training data, such adapters score as the plain one does.
RECIPES |= {
    "extract-plain": replace(RECIPES["extract"], data="extract"),
    "extract-float32": replace(RECIPES["extract"], data="extract", dtype="float32"),
    "extract-kept": replace(RECIPES["extract"], data="extract", **KEPT),
    "extract-retain-1": replace(RECIPES["extract"], data="extract", retain=1.0, dtype="float32"),
    "extract-retain-10": replace(RECIPES["extract"], data="extract", retain=10.0, dtype="float32"),
}
RECIPES |= {
    name: replace(
        RECIPES["extract"],
        data="extract", coordinates="natural", lrs=(lr,), steps=60, dtype="float32",
    )
    for name, lr in (
        ("extract-natural", 3e-3), ("extract", 6e-3), ("extract-natural-1.2e-2", 1.2e-2)
    )
}  # fmt: skip
# Small steps, and three times as many: in natural coordinates 100 steps have not learned enough. On
# 200 rows the rates did not differ by more than chance.
LONG: dict[str, Any] = NATURAL | {
    "lrs": (1.5e-3, 3e-3), "steps": 300, "dtype": "float32", "validation": 400,
}  # fmt: skip
RECIPES |= {
    "sentiment-plain": replace(RECIPES["sentiment"], data="sentiment"),
    "sentiment": replace(RECIPES["sentiment"], **LONG),
}
# A core of inner rank 8, as benchmarks/front chose for iso-date. On 200 training rows kept apart
# the rates 6e-3, 1.2e-2 and 2.4e-2 gave .910 / .0075, .920 / .0182, .940 / .0643 (accuracy / KL):
# the first is better than the recipe of before (.895 / .0106) in both, the others keep less.
RECIPES |= {
    "iso-date-natural": replace(RECIPES["iso-date"], data="iso-date"),
    "iso-date": replace(RECIPES["iso-date"], core="ab", inner_rank=8, lrs=(6e-3,), dtype="float32"),
}
NOT_SHIPPED = (
    "iso-date-plain", "iso-date-natural", "iso-date-kept",
    "sentiment-plain", "sentiment-natural", "sentiment-kept",
    "extract-plain", "extract-float32", "extract-natural", "extract-natural-1.2e-2",
    "extract-kept", "extract-retain-1", "extract-retain-10",
)  # fmt: skip


def once(file: Path, make: Callable[[], Any]) -> Any:
    """The JSON in ``file``, made first if it is not there."""
    if not file.exists():
        value = make()
        file.parent.mkdir(parents=True, exist_ok=True)
        file.with_suffix(".tmp").write_text(json.dumps(value, indent=1) + "\n")
        file.with_suffix(".tmp").rename(file)
    return json.loads(file.read_text())


def chosen(tried: dict[float, dict[str, Any]], margin: float) -> float:
    """Return the rate of least KL among those that score at least the best less ``margin``."""
    enough = max(result["accuracy"] for result in tried.values()) - margin
    equal = {lr: result for lr, result in tried.items() if result["accuracy"] >= enough - 1e-9}
    # Where KL was not measured the smallest rate is taken.
    return min(sorted(equal), key=lambda lr: equal[lr]["retention"]["kl"] or 0.0)


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


def evaluate_adapter(
    folder: Path, task: str, test: Path, kept: Path | None = None
) -> dict[str, Any]:
    """Held-out accuracy and retention of an adapter as it lies on disk, in bfloat16 as served.

    Args:
        kept: where the base's answers to the general-knowledge questions are, or will be; None
            leaves these out.
    """
    model, tokenizer, _ = load_base(BASE, "bfloat16", "cpu")
    tuned = PeftModel.from_pretrained(model, str(folder))
    drift = retention(tuned, tokenizer, neutral_texts().texts)
    if RECIPES[task].magnorm != "none":
        # The same weights as in the forward pass, made once instead of at every token.
        tuned.merge_adapter()
    facts = _accuracy(tuned, tokenizer, task, test, RECIPES[task].max_new_tokens)
    facts |= {"retention": asdict(drift)}
    if kept is not None:
        # With the base's own weights, should its answers not be there yet.
        base = Base(lambda: load_base(BASE, "bfloat16", "cpu")[0].eval(), tokenizer,
                    f"{BASE} bfloat16", kept)  # fmt: skip
        facts["questions"] = knowledge(tuned, tokenizer, base)
        facts["retention"] |= {key: share["accuracy"] for key, share in facts["questions"].items()}
    return facts


def _data(task: str, folder: Path) -> tuple[Path, Path, Path]:
    """Files to train on, to choose the learning rate by, and to report."""
    recipe = RECIPES[task]
    data, test = make_data.write(recipe.data or task, folder)
    if len(recipe.lrs) == 1:
        return data, data, test
    lines = data.read_text().splitlines(keepends=True)
    fit, chosen_by = folder / f"{task}.fit.jsonl", folder / f"{task}.validation.jsonl"
    fit.write_text("".join(lines[: -recipe.validation]))
    chosen_by.write_text("".join(lines[-recipe.validation :]))
    return fit, chosen_by, test


def run(task: str, seeds: list[int], work: Path) -> None:
    """Every step of one recipe."""
    recipe, scores = RECIPES[task], work / "scores"
    data, chosen_by, test = _data(task, work / "data")

    def trained(lr: float, seed: int) -> Path:
        out = work / "out" / f"{lr:g}" / str(seed) / task
        config = TrainConfig(
            base=BASE, data=str(data), eval_data=str(test), out=str(out), rank=32, learning_rate=lr,
            max_steps=recipe.steps, per_device_train_batch_size=8, max_length=160, seed=seed,
            device="cpu", core=recipe.core, inner_rank=recipe.inner_rank, magnorm=recipe.magnorm,
            coordinates=recipe.coordinates, retain=recipe.retain, dtype=recipe.dtype,
            resume="auto",
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
    best = chosen(tried, recipe.margin) if tried else recipe.lrs[0]
    for seed in seeds:
        out = trained(best, seed)
        once(
            scores / f"{best:g}" / f"{task}-{seed}.json",
            lambda out=out: evaluate_adapter(out, task, test, work / "base"),
        )
        once(scores / f"{task}-base.json", lambda: evaluate_base(task, test))
        publish(task, work, best, tried)


def publish(task: str, work: Path, best: float, tried: dict[float, dict[str, Any]]) -> None:
    """Write what was measured to ``FIGURES``, and what is shipped to ``adapters/``, with a card."""
    source, measured = work / "out" / f"{best:g}" / "0" / task, work / "scores" / f"{best:g}"
    scores = {f.stem.rsplit("-", 1)[1]: json.loads(f.read_text())
              for f in sorted(measured.glob(f"{task}-[0-9]*.json"))}  # fmt: skip
    base = json.loads((work / "scores" / f"{task}-base.json").read_text())
    facts = json.loads((source / "train.json").read_text())
    evaluation = {
        "kind": RECIPES[task].scoring,
        "max_new_tokens": RECIPES[task].max_new_tokens,
        "neutral_text": neutral_texts().source,
        "validation_by_lr": {
            f"{lr:g}": {"accuracy": result["accuracy"], "kl": result["retention"]["kl"]}
            for lr, result in tried.items()
        },
        "base": base,
        "seeds": scores,
        "accuracy_mean_sd": _mean_sd([s["accuracy"] for s in scores.values()]),
        "kl_mean_sd": _mean_sd([s["retention"]["kl"] for s in scores.values()]),
        "perplexity_ratio_mean_sd": _mean_sd(
            [s["retention"]["perplexity_ratio"] for s in scores.values()]
        ),
    }
    figures = json.loads(FIGURES.read_text()) if FIGURES.is_file() else {}
    figures[task] = header(("torch", "transformers", "peft")) | {
        "command": f"python -m benchmarks.adapters.run --task {task}",
        "learning_rate": best,
        "evaluation": evaluation,
    }
    FIGURES.write_text(json.dumps(figures, indent=1, sort_keys=True) + "\n")
    target = ADAPTERS / task
    if task in NOT_SHIPPED:
        return
    if target.exists():
        shutil.rmtree(target)
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("curves.*"))
    facts["evaluation"] = evaluation
    (target / "train.json").write_text(json.dumps(facts, indent=1) + "\n")
    (target / "README.md").write_text(_card(task, facts))


def _mean_sd(values: list[float]) -> list[float]:
    return [statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0]


def _variants(task: str) -> str:
    """Score and retention of every recipe for the same task that was measured, one row each."""
    figures = json.loads(FIGURES.read_text())
    rows = [
        "| recipe | held-out accuracy | KL | perplexity × | still right |",
        "|---|---|---|---|---|",
    ]
    for name, recipe in RECIPES.items():
        if (recipe.data or name) != (RECIPES[task].data or task) or name not in figures:
            continue
        evaluation, rate = figures[name]["evaluation"], f"{figures[name]['learning_rate']:g}"
        if tuned := evaluation["validation_by_lr"]:
            rate += f" of {', '.join(tuned)}"
        link = f"`{name}`" if name in NOT_SHIPPED else f"[`{name}`](../{name})"
        variant = f"core `{recipe.core}`, S-MagNorm `{recipe.magnorm}`, {recipe.coordinates} "
        variant += "coordinates, "
        if recipe.retain:
            variant += f"`--retain {recipe.retain:g}`, "
        variant += f"learning rate {rate}"
        cells = [_spread(evaluation, k) for k in ("accuracy", "kl", "perplexity_ratio")]
        still = evaluation["seeds"]["0"]["retention"]["still_right"]
        rows.append(f"| {link}: {variant} | {' | '.join(cells)} | {still:.3f} |")
    return "\n".join(rows) if len(rows) > 3 else ""


def _spread(evaluation: dict[str, Any], key: str) -> str:
    mean, sd = evaluation[f"{key}_mean_sd"]
    return f"{mean:.3f} ± {sd:.3f}"


def _questions(shipped: dict[str, Any]) -> str:
    """Return what became of the answers that the base gets right, as rows of the table."""
    right, same = (shipped["questions"][key] for key in ("still_right", "unchanged"))
    return (
        f"| the {right['n']} general-knowledge questions that the base gets right: still right | "
        f"{right['accuracy']:.3f} | – |\n"
        f"| answered word for word as the base does | {same['accuracy']:.3f} | – |\n"
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
    rates = evaluation["validation_by_lr"]
    if not rates:
        choice = (
            "Learning rate, length and training data were settled by hand while looking at "
            "held-out scores of\nseed 0; there was no further validation set."
        )
    elif margin := RECIPES[task].margin:
        choice = (
            f"Of the learning rates {', '.join(rates)}, one training with seed 0 each, it is the "
            f"one of least KL among those\nwithin {margin:g} of the best accuracy on "
            f"{recipe.validation} training items kept apart."
        )
    else:
        choice = (
            f"The learning rate is the best of {', '.join(rates)} on {recipe.validation} "
            "training items kept apart, one training with seed 0 each."
        )
    norm = f"`{settings['magnorm']}`"
    if settings["magnorm"] == "bounded":
        norm += (
            f" with τ = {settings['tau']:g}: no weight moves by more than that share of itself\n"
            "(before the result is rounded to the base's dtype). "
            "That makes the update full-rank: it is served per request from a place of the engine "
            "(`--resident`), folded\ninto the weights (`--fold` with its name), or merged "
            "(`secura-merge`)"
        )
    core = f"`{settings['core']}`"
    if settings["core"] == "ab":
        core += f" (A·B, inner rank {settings['inner_rank'] or settings['rank']})"
    kept = f", `--retain {settings['retain']:g}`" if settings["retain"] else ""
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
{_questions(shipped)}
{variants + chr(10) * 2 if variants else ""}Shipped is the run with seed 0, whatever its score. \
Base and adapter got the same prompts and the same
lenient scoring (`{recipe.scoring}` in `secura_serve.evaluate.SCORERS`), greedy decoding of at most
{recipe.max_new_tokens} tokens for the adapter and {max(BASE_ROOM, recipe.max_new_tokens)} for the
base. Neutral English: {evaluation["neutral_text"]}, first 64 tokens each.
{choice}

Adapter: ΔW = C·U·R on all seven linear layers of each block, rank {settings["rank"]}, core
{core}, S-MagNorm {norm}. Basis `{settings["selection"]}` with seed
{settings["selection_seed"]} (shared by all adapters here), {settings["coordinates"]} \
coordinates{kept},
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
