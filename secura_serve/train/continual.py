"""Training on task after task: the loop, and where a sequence that was stopped goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, set_seed
from transformers.utils import logging as hf_logging

from secura_serve.errors import ConfigError, DataError
from secura_serve.train.base import load_tokenizer
from secura_serve.train.card import recipe, write
from secura_serve.train.checkpoints import processes
from secura_serve.train.course import Course, Scores
from secura_serve.train.data import Collator, Rows, encode, split
from secura_serve.train.ewc import EWC
from secura_serve.train.fit import Interrupted, fit
from secura_serve.train.loss import held_out
from secura_serve.train.methods import Tuned, kept_tensors, prepare, restore
from secura_serve.train.records import Record, digest, parse_columns, read
from secura_serve.train.replay import Replay
from secura_serve.train.run import Run, announce, check_out, say
from secura_serve.train.sequence import SequenceConfig
from secura_serve.train.slow_copy import SlowCopy
from secura_serve.train.stages import StageFolder
from secura_serve.train.strategy import Strategy

__all__ = ["Scorer", "score_answers", "strategy", "train_sequence", "write_sequence"]

Scorer = Callable[[Tuned, str, Rows], dict[str, float]]
"""``(model, task, rows of its test file) -> scores``, the one named by ``--score`` among them."""


@dataclass(frozen=True)
class _Task:
    name: str
    train: Rows
    held: Rows
    test: Rows
    read: int


def score_answers(tuned: Tuned, task: str, rows: Rows) -> dict[str, float]:
    """Loss, token accuracy and exact match of the answers, see :func:`held_out`."""
    collate = Collator(tuned.tokenizer.pad_token_id)
    return held_out(tuned.model, rows, collate, tuned.config.batch_size)


def strategy(config: SequenceConfig, tuned: Tuned) -> Strategy:
    """The strategy that the settings ask for, before its first task."""
    c = config
    if c.strategy == "er":
        return Replay(c.replay, c.replay_share, c.seed)
    if c.strategy == "ewc":
        collate = Collator(tuned.tokenizer.pad_token_id)
        return EWC(tuned.model, collate, c.ewc_lambda, c.ewc_samples, c.seed)
    if c.strategy == "ilora":
        share, decay = c.replay_share, c.ema_decay
        return SlowCopy(tuned.model, c.replay, share, c.seed, decay, c.consistency)
    return Strategy()


def train_sequence(
    config: SequenceConfig, *, scorer: Scorer = score_answers, log: Sequence[TrainerCallback] = ()
) -> tuple[Run, Course]:
    """Train one adapter (or all weights) on each task in turn; ``--out`` is not written.

    Each task is a :func:`fit` with a fresh optimiser and schedule from the weights that the task
    before left: with the CUR methods U goes on where it was. All tasks are scored before the
    first and after each. What a finished task left is kept in the run's folder and not trained
    again, and the outcome is the same to the last bit.

    Raises:
        ConfigError, DataError, BaseModelError: before the training starts.
        Interrupted: on Ctrl-C; finished tasks are kept.
    """
    if processes() > 1:
        raise ConfigError("--tasks runs in one process; leave accelerate launch out")
    check_out(config)
    for out in _stage_folders(config):
        check_out(replace(config, out=str(out), overwrite=bool(config.overwrite or config.resume)))
    records = _records(config)
    folder = StageFolder(config)
    with folder.locked():
        return _train_sequence(config, folder, records, scorer, log)


def _train_sequence(
    config: SequenceConfig,
    folder: StageFolder,
    records: Mapping[str, tuple[list[Record], list[Record], list[Record]]],
    scorer: Scorer,
    log: Sequence[TrainerCallback],
) -> tuple[Run, Course]:
    start = folder.open({name: digest(path) for name, path in config.sources().items()})
    set_seed(config.seed)
    hf_logging.set_verbosity_error()
    tokenizer = load_tokenizer(config.base)
    tasks = [_encoded(name, parts, tokenizer, config) for name, parts in records.items()]
    tuned = prepare(config)
    chosen = strategy(config, tuned)
    course = Course(tuple(records), config.score)
    if start is not None:
        facts, tensors = folder.read()
        course = Course.from_json(facts["course"])
        restore(tuned.model, tensors["trained"])
        chosen.load(tensors.get("strategy", {}), facts["strategy"])

    def scores() -> Scores:
        return {task.name: scorer(tuned, task.name, task.test) for task in tasks}

    course.untrained = course.untrained or scores()
    for number, task in list(enumerate(tasks, 1))[len(course.stages) :]:
        rows = chosen.rows(task.train)
        say(f"task {number} of {len(tasks)}, {task.name}: {len(rows) - len(task.train)} replayed")
        announce(tuned, rows, task.held, task.read, None)
        try:
            found = fit(
                tuned,
                rows,
                held=task.held,
                extra_loss=chosen.extra_loss,
                callbacks=[*log, *chosen.callbacks],
            )
        except Interrupted as stop:
            stop.checkpoint = folder.stage if folder.stage.exists() else None
            raise
        chosen.finish(task.train)
        with _as_written(tuned, chosen):
            replayed = len(rows) - len(task.train)
            course.add(task.name, len(task.train), replayed, found, scores())
            say(f"{config.score} after {task.name}: {course.latest()}")
            if config.keep_stages:
                out = _stage_folders(config)[number - 1]
                kept = replace(config, out=str(out), overwrite=True)
                write(kept, _run(tuned, course), section=course.table())
        facts = {"course": course.to_json(), "strategy": chosen.facts()}
        parts = {"trained": kept_tensors(tuned.model), "strategy": chosen.tensors()}
        folder.write(facts, **{name: held for name, held in parts.items() if held})
    restore(tuned.model, kept_tensors(tuned.model) | chosen.written())
    return replace(_run(tuned, course, course.summary()), folder=folder), course


def write_sequence(config: SequenceConfig, run: Run, course: Course) -> Path:
    """Write ``--out`` as for any run, with the table in the card and ``continual.json``."""
    report = json.dumps(course.report(recipe(config, run)), indent=1) + "\n"
    return write(config, run, files={"continual.json": report}, section=course.table())


def _run(tuned: Tuned, course: Course, summary: dict[str, float] | None = None) -> Run:
    last = course.stages[-1]
    scores = {f"{task}_{course.score}": s[course.score] for task, s in last.scores.items()}
    scores |= {"train_loss": last.train_loss, "steps": float(sum(s.steps for s in course.stages))}
    seconds = sum(stage.seconds for stage in course.stages)
    return Run(tuned, (summary or {}) | scores, seconds, course.history)


@contextmanager
def _as_written(tuned: Tuned, chosen: Strategy) -> Iterator[None]:
    """The model with what the strategy evaluates and writes, for the length of the block."""
    held = kept_tensors(tuned.model)
    trained = {name: held[name].detach().clone() for name in chosen.written()}
    restore(tuned.model, held | chosen.written())
    try:
        yield
    finally:
        restore(tuned.model, held | trained)


def _stage_folders(config: SequenceConfig) -> list[Path]:
    if not config.keep_stages:
        return []
    out = Path(os.path.abspath(config.out))
    names = [task.name for task in config.task_list()]
    return [out.with_name(f"{out.name}-{n}-{name}") for n, name in enumerate(names, 1)]


def _records(config: SequenceConfig) -> dict[str, tuple[list[Record], list[Record], list[Record]]]:
    """Task -> training, held-out and test records."""
    labels = [text.strip() for text in (config.labels or "").split(",") if text.strip()]
    columns = parse_columns(config.data_columns)
    found, problems = {}, []
    for task in config.task_list():
        try:
            train, test = (read(p, columns=columns, labels=labels) for p in (task.train, task.test))
        except DataError as error:
            problems += [f"{task.name}: {problem}" for problem in error.problems]
            continue
        train, held = split(train, config.eval_split)
        if not train or (config.eval_split and not held):
            problems.append(f"{task.name}: eval_split {config.eval_split} leaves one side empty")
        found[task.name] = (train, held, test)
    if problems:
        raise DataError("the tasks cannot be used:", problems)
    return found


def _encoded(
    name: str, parts: Sequence[list[Record]], tokenizer: Any, config: SequenceConfig
) -> _Task:
    options: dict[str, Any] = {"max_length": config.max_length, "over_long": config.over_long}
    train, held, test = (encode(part, tokenizer, **options) for part in parts)
    return _Task(name, train, held, test, len(parts[0]))
