"""One training run: settings in, a trained model and what was measured out."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, set_seed
from transformers.utils import logging as hf_logging

from secura_serve.adapter import check_name
from secura_serve.atomic import check_target
from secura_serve.errors import ConfigError
from secura_serve.train import memory
from secura_serve.train.base import load_tokenizer
from secura_serve.train.checkpoints import RunFolder, is_main_process, processes
from secura_serve.train.data import Rows, encode, split
from secura_serve.train.fit import fit
from secura_serve.train.methods import Tuned, prepare
from secura_serve.train.records import Record, digest, parse_columns, read
from secura_serve.train.settings import TrainConfig

__all__ = ["Run", "announce", "check_out", "say", "train"]


@dataclass(frozen=True)
class Run:
    """A finished run: the model as it was trained, and what was measured."""

    tuned: Tuned
    scores: dict[str, float]
    seconds: float
    history: list[dict[str, Any]] = field(default_factory=list)
    folder: RunFolder | None = None

    @property
    def model(self) -> Any:
        """The trained model."""
        return self.tuned.model


def train(config: TrainConfig, *, log: Sequence[TrainerCallback] = ()) -> Run:
    """Train once; ``--out`` is not written (see :func:`secura_serve.train.card.write`).

    The same settings, data, thread count and versions give the same tensors, whether the run was
    interrupted and resumed or not. ``log`` takes transformers ``TrainerCallback`` objects.

    Raises:
        ConfigError, DataError, BaseModelError: before the training starts; another run at work in
            the same folder is a ConfigError.
        Interrupted: on Ctrl-C, after a checkpoint.
    """
    check_out(config)
    records, held = _records(config)
    folder = RunFolder(config)
    with folder.locked():
        return _train(config, folder, records, held, log)


def _train(
    config: TrainConfig,
    folder: RunFolder,
    records: list[Record],
    held: list[Record],
    log: Sequence[TrainerCallback],
) -> Run:
    digests = {name: digest(path) for name, path in config.sources().items()}
    start = folder.open(digests, processes())
    for damage in folder.damaged:
        say(f"left aside, damaged: {damage}")
    if config.resume and start is None:
        say(f"no checkpoint in {folder.path} yet: the run starts from the beginning")
    set_seed(config.seed)
    hf_logging.set_verbosity_error()
    # An example that cannot be used is told before the weights are loaded.
    tokenizer = load_tokenizer(config.base)
    rows, kept = (_rows(part, tokenizer, config) for part in (records, held))
    before = memory.resident()
    tuned = prepare(config)
    announce(tuned, rows, kept, len(records), start)
    found = fit(tuned, rows, held=kept, callbacks=log, run_dir=folder.path, resume=start)
    if not any(entry.get("learning_rate") for entry in found.history):
        say("nothing was learnt: warm-up took every step, at learning rate 0; give --warmup 0")
    if found.best is not None:
        say(f"ended at step {found.steps}; step {found.best}, the best, is kept")
    expected = memory.estimate(tuned, rows).total / memory.GIB
    used = (memory.peak() - before) / memory.GIB
    say(f"memory: {used:.2f} GiB more at the peak than before the base; estimated {expected:.2f}")
    scores = {"train_loss": found.train_loss, "steps": float(found.steps)}
    scores |= {f"held_out_{name}": value for name, value in found.held_out.items()}
    return Run(tuned, scores, found.seconds, found.history, folder)


def _records(config: TrainConfig) -> tuple[list[Record], list[Record]]:
    """Training and held-out records."""
    labels = [text.strip() for text in (config.labels or "").split(",") if text.strip()]
    columns = parse_columns(config.data_columns)
    records = read(config.data, columns=columns, labels=labels)
    if config.eval_data:
        return records, read(config.eval_data, columns=columns, labels=labels)
    records, kept = split(records, config.eval_split)
    if not records:
        raise ConfigError(f"eval_split {config.eval_split} leaves no training data")
    if config.eval_split and not kept:
        raise ConfigError(
            f"eval_split {config.eval_split} of {len(records)} examples leaves nothing to evaluate "
            f"on; give at least {1 / len(records):.2g}"
        )
    return records, kept


def _rows(records: list[Record], tokenizer: Any, config: TrainConfig) -> Rows:
    return encode(records, tokenizer, config.max_length, config.over_long)


def check_out(config: TrainConfig) -> None:
    """Refuse ``--out`` before the training, not after it.

    Raises:
        ConfigError: its name cannot be an adapter's, or see :func:`check_target`.
    """
    out = Path(config.out).absolute()
    check_name(out.name)
    check_target(out, config.overwrite, "train.json", "adapter_config.json")


def announce(tuned: Tuned, rows: Rows, kept: Rows, read: int, start: Path | None) -> None:
    """Say what is about to be trained, and whether its memory is there; ``read`` counts records."""
    trained = sum(p.numel() for p in tuned.model.parameters() if p.requires_grad)
    skipped = f", {read - len(rows)} over-long ones left out" if len(rows) < read else ""
    say(
        f"{tuned.config.method}: {trained:,} trained numbers, {len(rows)} examples{skipped}, "
        f"{len(kept)} held out"
        + (f", {processes()} processes" if processes() > 1 else "")
        + (f"; goes on from {start}" if start else "")
    )
    expected = memory.estimate(tuned, rows)
    say(f"memory: about {expected} per process")
    free = memory.available()
    if expected.training + expected.activations > free:
        say(
            f"memory: only {free / memory.GIB:.2f} GiB are free beside the loaded weights; lower "
            "--batch-size (and raise --accumulate) or --max-length if the run is killed"
        )


def say(text: str) -> None:
    """Tell the user, once however many processes there are."""
    if is_main_process():
        print(f"secura-train: {text}", file=sys.stderr)
