"""One evaluation: check everything, ask every model, compare."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from secura_serve.errors import ConfigError, DataError, SecuraError
from secura_serve.evaluate import harness
from secura_serve.evaluate.config import EvalConfig
from secura_serve.evaluate.metrics.significance import paired, wilson
from secura_serve.evaluate.models.base import Models
from secura_serve.evaluate.neutral_text import neutral_texts
from secura_serve.evaluate.tasks import TASKS, Task, load_task
from secura_serve.evaluate.tasks.registry import suggestion

__all__ = ["KNOWLEDGE", "Results", "evaluate", "open_models"]

KNOWLEDGE = ("capitals", "currencies")
"""Their test rows are the general-knowledge questions of retention."""


@dataclass
class Results:
    """What was measured, as it stands in ``results.json``; every key is a task or model name."""

    where: str
    base: str | None
    models: tuple[str, ...]
    tasks: dict[str, Any] = field(default_factory=dict)
    harness: dict[str, Any] = field(default_factory=dict)
    retention: dict[str, Any] = field(default_factory=dict)
    answers: list[dict[str, Any]] = field(default_factory=list)


def open_models(config: EvalConfig) -> Models:
    """Open the models at the endpoint, or in this process.

    Raises:
        EvaluationError: some cannot be asked.
    """
    if config.endpoint is not None:
        from secura_serve.evaluate.models.endpoint import Endpoint

        return Endpoint(config)
    from secura_serve.evaluate.models.local import Local

    return Local(config)


def _check_models(config: EvalConfig) -> None:
    """Raise what :func:`open_models` would raise, without loading the weights of a base."""
    if config.base is None:
        open_models(config)
        return
    from secura_serve.evaluate.models.local import check_adapters

    check_adapters(config.base, config.adapter)


def _plan(config: EvalConfig) -> tuple[list[Task], dict[str, Any]]:
    """Return the offline tasks, and those of the harness with their data.

    Raises:
        ConfigError, DataError: every task that cannot be run, and why; if there is one, also every
            model that cannot be asked.
    """
    stray = [
        f"--task-data {name}: no such harness task is asked for"
        for name in config.local_data()
        if name in TASKS or name not in config.tasks
    ]
    if stray:
        # Before the hub is asked for the data that the misspelt one was to replace.
        raise ConfigError("nothing was evaluated:", stray)
    ours: list[Task] = []
    theirs: dict[str, Any] = {}
    problems: list[str] = []
    wrong_use = False

    def attempt(work: Callable[[], object]) -> None:
        nonlocal wrong_use
        try:
            work()
        except SecuraError as error:
            problems.extend(error.problems)
            wrong_use |= error.wrong_use

    for name in dict.fromkeys(config.tasks):

        def one(name: str = name) -> None:
            try:
                task = load_task(name)
            except ConfigError:
                if name not in harness.HARNESS and harness.missing():
                    known = sorted([*TASKS, *harness.HARNESS])
                    raise ConfigError(f"task {name!r}: {suggestion(name, known)}") from None
                theirs[name] = harness.prepare(name, config)
            else:
                if reason := task.missing():
                    raise DataError(f"{name}: not available: {reason}")
                ours.append(task)

        attempt(one)
    if config.retention:
        attempt(_retention_data)
    if problems:
        # One run shows everything to mend, also what opening the models would find.
        attempt(lambda: _check_models(config))
        kind = ConfigError if wrong_use else DataError
        raise kind("nothing was evaluated:", problems)
    return ours, theirs


def _retention_data() -> tuple[str, list[str]]:
    for name in KNOWLEDGE:
        if reason := load_task(name).missing():
            raise DataError(f"retention asks {name}: {reason}; or give --no-retention")
    try:
        return neutral_texts()
    except DataError as error:
        raise DataError(f"retention: {error}; or give --no-retention") from error


def evaluate(config: EvalConfig) -> Results:
    """Measure everything that ``config`` asks for.

    Raises:
        ConfigError, DataError, EvaluationError: before the first question, wherever possible.
    """
    ours, theirs = _plan(config)
    models = open_models(config)
    results = Results(models.where, models.base, models.names)
    given: dict[tuple[str, str, str], list[str]] = {}

    def ask(task: Task, split: Any, items: int, model: str) -> list[str]:
        """Return answers, from the run's own where the same was asked before."""
        prompts = [prompt for prompt, _ in task.rows(split)][: items or None]
        key = (model, task.name, split)
        if len(given.get(key, [])) < len(prompts):
            given[key] = models.answers(model, prompts, task.max_new_tokens)
        return given[key][: len(prompts)]

    for task in ours:
        rows = task.rows(config.split)[: config.limit or None]  # type: ignore[arg-type]
        wanted = [completion for _, completion in rows]
        right = {}
        for model in models.names:
            answers = ask(task, config.split, config.limit, model)
            right[model] = task.right(answers, wanted)
            results.answers += [
                {
                    "task": task.name,
                    "model": model,
                    "prompt": p,
                    "wanted": w,
                    "answer": a,
                    "right": r,
                }
                for (p, w), a, r in zip(rows, answers, right[model], strict=True)
            ]
        results.tasks[task.name] = {
            "title": task.title,
            "source": task.source,
            "stands_for": task.stands_for,
            "split": config.split,
            "n": len(rows),
            "metric": "accuracy",
            "scoring": task.scoring,
            "max_new_tokens": task.max_new_tokens,
            "scores": {model: asdict(wilson(flags)) for model, flags in right.items()},
            "against_base": {
                model: asdict(paired(flags, right[models.base]))
                for model, flags in right.items()
                if models.base and model != models.base
            },
        }
    for name, task in theirs.items():
        scores = {m: harness.run(name, task, m, models, config) for m in models.names}
        results.harness[name] = {
            "title": harness.HARNESS[name].title if name in harness.HARNESS else name,
            "data": config.local_data().get(name) or str(task.DATASET_PATH),
            "shots": task.config.num_fewshot or 0,
            "scores": scores,
        }
    if config.retention and models.base:
        _retention(models, ask, results)
    return results


def _retention(
    models: Models, ask: Callable[[Task, str, int, str], list[str]], results: Results
) -> None:
    """Measure what each model keeps of the base: neutral text, and general knowledge."""
    assert models.base is not None
    source, texts = neutral_texts()
    questions = [(load_task(name), load_task(name).rows("test")) for name in KNOWLEDGE]

    def known(model: str) -> tuple[list[str], list[bool]]:
        answers: list[str] = []
        right: list[bool] = []
        for task, rows in questions:
            said = ask(task, "test", 0, model)
            answers += said
            right += task.right(said, [completion for _, completion in rows])
        return answers, right

    others = [name for name in models.names if name != models.base]
    if not others:
        return
    before, was_right = known(models.base)
    results.retention = {
        "neutral_text": source,
        "questions": f"test rows of {', '.join(KNOWLEDGE)}",
        "base": asdict(wilson(was_right)),
        "models": {},
    }
    for model in others:
        after, right = known(model)
        still = [now for now, then in zip(right, was_right, strict=True) if then]
        results.retention["models"][model] = {
            **asdict(models.drift(model, texts)),
            "answers_unchanged": asdict(
                wilson([a == b for a, b in zip(after, before, strict=True)])
            ),
            "right": asdict(wilson(right)),
            "still_right": asdict(wilson(still)) if still else None,
        }
