"""One training run: settings in, a trained model and its scores out."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, set_seed
from transformers.utils import logging as hf_logging

from secura_serve.adapter import check_name
from secura_serve.errors import ConfigError
from secura_serve.system.atomic import check_target
from secura_serve.train import memory
from secura_serve.train.callbacks import PushCallback
from secura_serve.train.data import Record, Rows, digest, encode, parse_columns, read, split
from secura_serve.train.loop.fit import fit
from secura_serve.train.methods.base import load_tokenizer
from secura_serve.train.methods.preparation import prepare
from secura_serve.train.methods.prepared import PreparedModel
from secura_serve.train.output.checkpoints import RunFolder, is_main_process, processes
from secura_serve.train.retention import (
    Retention,
    mean_retention,
    prepare_retention,
    supplied_rows,
)
from secura_serve.train.settings import SELF, TrainConfig

__all__ = ["Run", "check_out", "log", "log_plan", "train"]


@dataclass(frozen=True)
class Run:
    """A finished run: the trained model and what was measured."""

    prepared: PreparedModel
    scores: dict[str, float]
    seconds: float
    history: list[dict[str, Any]] = field(default_factory=list)
    folder: RunFolder | None = None

    @property
    def model(self) -> Any:
        """The trained model."""
        return self.prepared.model


def train(config: TrainConfig, *, callbacks: Sequence[TrainerCallback] = ()) -> Run:
    """Train once; ``--out`` is not written (see :func:`secura_serve.train.output.card.write`).

    The same settings, data, thread count and versions give the same tensors, whether the run was
    interrupted and resumed or not.

    Args:
        callbacks: further callbacks of transformers' Trainer.

    Raises:
        ConfigError, DataError, BaseModelError: before the training starts. If another run is at
            work in the same folder, that is a ConfigError.
        Interrupted: on Ctrl-C, after a checkpoint.
    """
    check_out(config)
    records, held_out = _records(config)
    folder = RunFolder(config)
    with folder.locked():
        return _train(config, folder, records, held_out, callbacks)


def _train(
    config: TrainConfig,
    folder: RunFolder,
    records: list[Record],
    held_out: list[Record],
    callbacks: Sequence[TrainerCallback],
) -> Run:
    pushes = _pushes(config)
    digests = {name: digest(path) for name, path in config.sources().items()}
    start = folder.open(digests, processes())
    for damage in folder.damaged:
        log(f"damaged, so not used: {damage}")
    if config.resume and start is None:
        log(f"no checkpoint in {folder.path} yet: the run starts from the beginning")
    set_seed(config.seed)
    hf_logging.set_verbosity_error()
    # An example that cannot be used is reported before the weights are loaded.
    tokenizer = load_tokenizer(config.base)
    rows, eval_rows = (_rows(part, tokenizer, config) for part in (records, held_out))
    supplied = supplied_rows(config) if config.retain_data != SELF else None
    before = memory.resident()
    prepared = prepare(config)
    retention = prepare_retention(prepared, supplied)
    log_plan(prepared, rows, eval_rows, len(records), start, retention)
    result = fit(
        prepared,
        rows,
        held_out=eval_rows,
        retention=retention,
        callbacks=[*callbacks, *pushes],
        run_dir=folder.path,
        resume=start,
    )
    if not any(entry.get("learning_rate") for entry in result.history):
        log(
            "nothing was learnt: warm-up took every step, at learning rate 0; give --warmup-steps 0"
        )
    if result.best is not None:
        log(f"ended at step {result.steps}; step {result.best}, the best, is kept")
    expected = memory.estimate(prepared, rows, retention).total / memory.GIB
    used = (memory.peak() - before) / memory.GIB
    log(f"memory: {used:.2f} GiB more at the peak than before the base; estimated {expected:.2f}")
    scores = {"train_loss": result.train_loss, "steps": float(result.steps)}
    scores |= mean_retention(result.history)
    scores |= {f"held_out_{name}": value for name, value in result.held_out.items()}
    return Run(prepared, scores, result.seconds, result.history, folder)


def _pushes(config: TrainConfig) -> list[PushCallback]:
    if config.push_to is None:
        return []
    name = config.push_name or Path(config.out).absolute().name
    return [PushCallback(config.push_to, name, config.push_every)]


def _records(config: TrainConfig) -> tuple[list[Record], list[Record]]:
    """Read the training and the held-out records."""
    labels = [text.strip() for text in (config.labels or "").split(",") if text.strip()]
    columns = parse_columns(config.data_columns)
    records = read(config.data, columns=columns, labels=labels)
    if config.eval_data:
        return records, read(config.eval_data, columns=columns, labels=labels)
    records, held_out = split(records, config.eval_split)
    if not records:
        raise ConfigError(f"eval_split {config.eval_split} leaves no training data")
    if config.eval_split and not held_out:
        raise ConfigError(
            f"eval_split {config.eval_split} of {len(records)} examples leaves nothing to evaluate "
            f"on; give at least {1 / len(records):.2g}"
        )
    return records, held_out


def _rows(records: list[Record], tokenizer: Any, config: TrainConfig) -> Rows:
    return encode(records, tokenizer, config.max_length, config.over_long)


def check_out(config: TrainConfig) -> None:
    """Raise before the training if ``--out`` could not be written after it.

    Raises:
        ConfigError: it is not a valid name of an adapter, or see :func:`check_target`.
    """
    out = Path(config.out).absolute()
    check_name(out.name)
    check_target(out, config.overwrite, "train.json", "adapter_config.json")


def log_plan(
    prepared: PreparedModel,
    rows: Rows,
    held_out: Rows,
    records: int,
    start: Path | None,
    retention: Retention | None = None,
) -> None:
    """Log what is about to be trained, and whether there is enough memory for it.

    Args:
        records: number of training records, over-long ones included.
        start: the checkpoint that the run goes on from.
    """
    skipped = f", {records - len(rows)} over-long ones left out" if len(rows) < records else ""
    log(
        f"{prepared.config.method}: {prepared.trainable_parameters:,} trainable parameters, "
        f"base in {prepared.config.dtype}, {len(rows)} examples{skipped}, {len(held_out)} held out"
        + (f", {processes()} processes" if processes() > 1 else "")
        + (f"; goes on from {start}" if start else "")
    )
    if retention:
        log(f"retention: {len(retention.rows)} rows, weight {retention.weight:g}")
    expected = memory.estimate(prepared, rows, retention)
    log(f"memory: about {expected} per process")
    free = memory.available()
    if expected.training + expected.activations > free:
        log(
            f"memory: only {free / memory.GIB:.2f} GiB are free beside the loaded weights; lower "
            "--per-device-train-batch-size (and raise --gradient-accumulation-steps) or "
            "--max-length if the run is killed"
        )


def log(text: str) -> None:
    """Print a line for the user to stderr, from the main process only."""
    if is_main_process():
        print(f"secura-train: {text}", file=sys.stderr)
