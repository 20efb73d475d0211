"""Training on task after task: the loop, and going on after a stop."""

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
from secura_serve.train.continual.config import SequenceConfig
from secura_serve.train.continual.results import Results, Scores
from secura_serve.train.continual.stages import StageFolder
from secura_serve.train.continual.strategies import get_strategy
from secura_serve.train.continual.strategies.base import Strategy
from secura_serve.train.data import (
    Collator,
    Record,
    Rows,
    digest,
    encode,
    parse_columns,
    read,
    split,
)
from secura_serve.train.loop.fit import Interrupted, fit
from secura_serve.train.loop.loss import score_rows
from secura_serve.train.methods.base import load_tokenizer
from secura_serve.train.methods.preparation import prepare
from secura_serve.train.methods.prepared import PreparedModel
from secura_serve.train.methods.tensors import checkpoint_tensors, restore
from secura_serve.train.output.card import run_facts, write
from secura_serve.train.output.checkpoints import processes
from secura_serve.train.retention import mean_retention, prepare_retention, supplied_rows
from secura_serve.train.run import Run, check_out, log, log_plan
from secura_serve.train.settings import SELF

__all__ = ["Scorer", "score_answers", "train_sequence", "write_sequence"]

Scorer = Callable[[PreparedModel, str, Rows], dict[str, float]]
"""``(model, task, rows of its test file) -> scores``, the one named by ``--score`` among them."""

TaskRecords = tuple[list[Record], list[Record], list[Record]]
"""Training, held-out and test records of a task."""


@dataclass(frozen=True)
class _Task:
    name: str
    train: Rows
    held_out: Rows
    test: Rows
    records: int
    """Number of training records, over-long ones included."""


def score_answers(prepared: PreparedModel, task: str, rows: Rows) -> dict[str, float]:
    """Return loss, token accuracy and exact match of the answers, see :func:`score_rows`."""
    collate = Collator(prepared.tokenizer.pad_token_id)
    return score_rows(prepared.model, rows, collate, prepared.config.per_device_train_batch_size)


def train_sequence(
    config: SequenceConfig,
    *,
    scorer: Scorer = score_answers,
    callbacks: Sequence[TrainerCallback] = (),
) -> tuple[Run, Results]:
    """Train one adapter (or all weights) on each task in turn; ``--out`` is not written.

    Each task is one :func:`fit`, with a fresh optimiser and schedule, from the weights after the
    task before: with the CUR methods, training of the same U goes on. All tasks are scored before
    the first one and after each. The state after a finished task is kept in the run's folder, so
    that a run that was stopped does not train it again; the outcome is the same to the last bit.

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
        return _train_sequence(config, folder, records, scorer, callbacks)


def _train_sequence(
    config: SequenceConfig,
    folder: StageFolder,
    records: Mapping[str, TaskRecords],
    scorer: Scorer,
    callbacks: Sequence[TrainerCallback],
) -> tuple[Run, Results]:
    start = folder.open({name: digest(path) for name, path in config.sources().items()})
    set_seed(config.seed)
    hf_logging.set_verbosity_error()
    tokenizer = load_tokenizer(config.base)
    tasks = [_encoded(name, parts, tokenizer, config) for name, parts in records.items()]
    supplied = supplied_rows(config) if config.retain_data != SELF else None
    prepared = prepare(config)
    # Before a finished task is put back: with all weights trained, the base would be gone.
    retention = prepare_retention(prepared, supplied)
    strategy = get_strategy(config.strategy).from_config(config, prepared)
    results = Results(tuple(records), config.score)
    if start is not None:
        facts, tensors = folder.read()
        # Earlier versions wrote "course".
        results = Results.from_json(facts["results"] if "results" in facts else facts["course"])
        restore(prepared.model, tensors["trained"])
        strategy.load(tensors.get("strategy", {}), facts["strategy"])

    def scores() -> Scores:
        return {task.name: scorer(prepared, task.name, task.test) for task in tasks}

    results.untrained = results.untrained or scores()
    for number, task in list(enumerate(tasks, 1))[len(results.stages) :]:
        rows = strategy.rows(task.train)
        replayed = len(rows) - len(task.train)
        log(f"task {number} of {len(tasks)}, {task.name}: {replayed} replayed")
        log_plan(prepared, rows, task.held_out, task.records, None, retention)
        if retention:
            retention.stage = number
        try:
            fitted = fit(
                prepared,
                rows,
                held_out=task.held_out,
                extra_loss=strategy.extra_loss,
                retention=retention,
                callbacks=[*callbacks, *strategy.callbacks],
            )
        except Interrupted as stop:
            stop.checkpoint = folder.stage if folder.stage.exists() else None
            raise
        strategy.finish(task.train)
        with _as_written(prepared, strategy):
            results.add(task.name, len(task.train), replayed, fitted, scores())
            log(f"{config.score} after {task.name}: {results.latest()}")
            if config.keep_stages:
                out = _stage_folders(config)[number - 1]
                stage_config = replace(config, out=str(out), overwrite=True)
                write(stage_config, _run(prepared, results), section=results.table())
        facts = {"results": results.to_json(), "strategy": strategy.facts()}
        state = {"trained": checkpoint_tensors(prepared.model), "strategy": strategy.tensors()}
        folder.write(facts, **{name: tensors for name, tensors in state.items() if tensors})
    restore(prepared.model, checkpoint_tensors(prepared.model) | strategy.written())
    return replace(_run(prepared, results, results.summary()), folder=folder), results


def write_sequence(config: SequenceConfig, run: Run, results: Results) -> Path:
    """Write ``--out`` as for any run, with the table in the card and ``continual.json``."""
    report = json.dumps(results.report(run_facts(config, run)), indent=1) + "\n"
    return write(config, run, files={"continual.json": report}, section=results.table())


def _run(prepared: PreparedModel, results: Results, summary: dict[str, float] | None = None) -> Run:
    last = results.stages[-1]
    scores = {f"{task}_{results.score}": s[results.score] for task, s in last.scores.items()}
    scores |= {"train_loss": last.train_loss, "steps": float(sum(s.steps for s in results.stages))}
    scores |= mean_retention(results.history)
    seconds = sum(stage.seconds for stage in results.stages)
    return Run(prepared, (summary or {}) | scores, seconds, results.history)


@contextmanager
def _as_written(prepared: PreparedModel, strategy: Strategy) -> Iterator[None]:
    """Put what the strategy scores and writes into the model, for the length of the block."""
    current = checkpoint_tensors(prepared.model)
    trained = {name: current[name].detach().clone() for name in strategy.written()}
    restore(prepared.model, current | strategy.written())
    try:
        yield
    finally:
        restore(prepared.model, current | trained)


def _stage_folders(config: SequenceConfig) -> list[Path]:
    """Return the folders of ``--keep-stages``, one per task."""
    if not config.keep_stages:
        return []
    out = Path(os.path.abspath(config.out))
    names = [task.name for task in config.task_list()]
    return [out.with_name(f"{out.name}-{n}-{name}") for n, name in enumerate(names, 1)]


def _records(config: SequenceConfig) -> dict[str, TaskRecords]:
    """Read the records of every task."""
    labels = [text.strip() for text in (config.labels or "").split(",") if text.strip()]
    columns = parse_columns(config.data_columns)
    records: dict[str, TaskRecords] = {}
    problems = []
    for task in config.task_list():
        try:
            train, test = (read(p, columns=columns, labels=labels) for p in (task.train, task.test))
        except DataError as error:
            problems += [f"{task.name}: {problem}" for problem in error.problems]
            continue
        train, held_out = split(train, config.eval_split)
        if not train or (config.eval_split and not held_out):
            problems.append(f"{task.name}: eval_split {config.eval_split} leaves one side empty")
        records[task.name] = (train, held_out, test)
    if problems:
        raise DataError("the tasks cannot be used:", problems)
    return records


def _encoded(name: str, records: TaskRecords, tokenizer: Any, config: SequenceConfig) -> _Task:
    options: dict[str, Any] = {"max_length": config.max_length, "over_long": config.over_long}
    train, held_out, test = (encode(part, tokenizer, **options) for part in records)
    return _Task(name, train, held_out, test, len(records[0]))
