"""Training a prepared model on rows: once in a run, once per task in continual learning."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    EarlyStoppingCallback,
    PrinterCallback,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)

from secura_serve.errors import ConfigError
from secura_serve.train.callbacks import Divergence, Fusion, Interrupt, Progress
from secura_serve.train.data import Batch, Collate, Collator, Rows
from secura_serve.train.loop.loss import ExtraLoss
from secura_serve.train.loop.packing import packer
from secura_serve.train.loop.trainer import AnswerTrainer
from secura_serve.train.methods.prepared import PreparedModel
from secura_serve.train.methods.registry import METHODS
from secura_serve.train.output.checkpoints import processes
from secura_serve.train.retention import Retention
from secura_serve.train.settings import TrainConfig

__all__ = ["FitResult", "Interrupted", "fit"]


@dataclass(frozen=True)
class FitResult:
    """What was measured in one :func:`fit`."""

    steps: int
    train_loss: float
    """Mean over the steps of the mean cross-entropy per answer token, and of any extra loss."""
    held_out: dict[str, float]
    best: int | None
    """With ``patience``: the step whose weights were kept."""
    seconds: float
    tokens: int
    history: list[dict[str, Any]]
    """One entry per step and per evaluation, as transformers logs them."""


class Interrupted(KeyboardInterrupt):
    """The run was ended by a signal; it can go on from ``checkpoint``, if there is one."""

    def __init__(self, step: int, steps: int, checkpoint: Path | None) -> None:
        super().__init__(f"interrupted at step {step} of {steps}")
        self.checkpoint = checkpoint


def fit(
    prepared: PreparedModel,
    rows: Rows,
    *,
    config: TrainConfig | None = None,
    held_out: Rows | None = None,
    extra_loss: ExtraLoss | None = None,
    retention: Retention | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    run_dir: Path | None = None,
    resume: Path | None = None,
) -> FitResult:
    """Train ``prepared.model`` in place on ``rows``, with a new optimiser.

    It can be called several times on one model, with the rows of one task each; that is continual
    learning::

        prepared = prepare(config)                              # base and adapter, once
        for task in tasks:
            rows = encode(read(task), prepared.tokenizer, config.max_length)
            fit(prepared, mix(rows, seen, 0.2, seed=0),         # replay: a share of earlier rows
                extra_loss=lambda model, batch, logits: ...)  # EWC, distillation
            seen += rows

    The loss of an optimiser step is the sum of the cross-entropies of its answer tokens divided
    by their number, over all accumulated batches and all processes, plus the mean over the
    batches of ``extra_loss(model, batch, logits)`` (see :data:`ExtraLoss`). The order of the rows
    depends on ``config.seed`` and the epoch alone.

    Args:
        config: settings of this call, ``prepared.config`` by default. Only those of the training
            are read: steps, batches, learning rate, seed, evaluation, checkpoints.
        held_out: rows to evaluate on, for ``eval_steps``, ``patience`` and the scores at the end.
        retention: the objective of ``retain``, from :func:`prepare_retention`; it adds to
            ``extra_loss``.
        callbacks: further transformers callbacks.
        run_dir: folder of the checkpoints; None writes none.
        resume: the checkpoint to go on from.

    Raises:
        Interrupted: on Ctrl-C or SIGTERM, after a checkpoint where there is a ``run_dir``.
        ConfigError: ``resume`` belongs to another method or base, the model cannot be packed, or
            ``retain`` is set and no ``retention`` given.
        TrainingError: the loss is NaN or infinite, or a checkpoint cannot be written.
    """
    config, held_out = config or prepared.config, held_out or []
    if config.retain and retention is None:
        raise ConfigError("retain: give fit(retention=prepare_retention(prepared))")
    padded = Collator(prepared.tokenizer.pad_token_id)
    collate: Collate = packer(prepared.model, rows, padded) if config.packing else padded
    bar = Progress()
    # It adds to what the others are told of a step.
    first = [retention] if retention else []
    all_callbacks = [*first, *callbacks, bar, Divergence(), *_fusion(config)]
    if config.patience:
        all_callbacks.append(EarlyStoppingCallback(config.patience))
    alone = processes() == 1
    interrupt = Interrupt()
    with (
        nullcontext(str(run_dir)) if run_dir else tempfile.TemporaryDirectory() as folder,
        # Several processes could not agree on a step to stop at, so there a signal acts at once.
        interrupt if alone else nullcontext(),
    ):
        trainer = AnswerTrainer(
            model=prepared.model,
            args=_arguments(config, folder, bool(run_dir), bool(held_out)),
            train_dataset=rows,
            eval_dataset=held_out or None,
            data_collator=collate,
            callbacks=[*all_callbacks, interrupt],
            padded=padded,
            extra_loss=_both(extra_loss, retention.loss) if retention else extra_loss,
        )
        trainer.remove_callback(PrinterCallback)
        try:
            result = trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        except BaseException:
            bar.close()
            raise
        state = trainer.state
        if interrupt.received and state.global_step < state.max_steps:
            at = run_dir / f"checkpoint-{state.global_step}" if run_dir else None
            raise Interrupted(state.global_step, state.max_steps, at)
        at_best = state.best_model_checkpoint if config.patience else None
        best = int(at_best.rpartition("-")[2]) if at_best else None
        scores = _scores_at(best or state.global_step, state) if held_out else {}
        if held_out and not scores:
            scores = trainer.held_out_scores()
            state.log_history.append(
                {"step": state.global_step} | {f"eval_{k}": v for k, v in scores.items()}
            )
    losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
    return FitResult(
        best=best,
        steps=state.global_step,
        train_loss=sum(losses) / len(losses),
        held_out=scores,
        seconds=float(result.metrics["train_runtime"]),
        tokens=int(state.num_input_tokens_seen),
        history=state.log_history,
    )


def _both(first: ExtraLoss | None, second: ExtraLoss) -> ExtraLoss:
    """Return the sum of two extra losses."""
    if first is None:
        return second

    def total(model: nn.Module, batch: Batch, logits: Tensor) -> Tensor:
        return first(model, batch, logits) + second(model, batch, logits)

    return total


def _scores_at(step: int, state: TrainerState) -> dict[str, float]:
    """Return the scores of the evaluation after ``step``; empty if there was none."""
    for entry in state.log_history:
        if entry["step"] == step and "eval_loss" in entry:
            scores = {k: v for k, v in entry.items() if k.startswith("eval_")}
            return {key.removeprefix("eval_"): value for key, value in scores.items()}
    return {}


def _fusion(config: TrainConfig) -> list[TrainerCallback]:
    return [Fusion(config.fusion_step)] if config.fusion_step else []


def _arguments(config: TrainConfig, folder: str, keep: bool, evaluate: bool) -> TrainingArguments:
    best = bool(config.patience and evaluate)
    every = config.eval_steps if best else config.save_steps
    return TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=config.per_device_train_batch_size,
        per_device_eval_batch_size=config.per_device_train_batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.lr_scheduler_type,
        warmup_steps=config.warmup_steps,
        weight_decay=config.weight_decay,
        num_train_epochs=config.num_train_epochs,
        max_steps=config.max_steps,
        seed=config.seed,
        remove_unused_columns=False,
        eval_strategy="steps" if evaluate and config.eval_steps else "no",
        eval_steps=config.eval_steps or None,
        # The best model is loaded back from its checkpoint.
        save_strategy="steps" if (keep and config.save_steps) or best else "no",
        save_steps=max(every, 1),
        # Two, because the newest may be half written when a run is killed.
        save_total_limit=2,
        load_best_model_at_end=best,
        metric_for_best_model="loss" if best else None,
        greater_is_better=False if best else None,
        restore_callback_states_from_checkpoint=True,
        include_num_input_tokens_seen="non_padding",
        report_to=[],
        # Progress shows the bar; as a subclass it would be removed with the trainer's own.
        disable_tqdm=True,
        logging_steps=1,
        logging_nan_inf_filter=False,
        use_cpu=config.device == "cpu" or not torch.cuda.is_available(),
        bf16=METHODS[config.method].trains_all_weights and config.dtype == "bfloat16",
        dataloader_pin_memory=False,
        # All that is trained takes part in every step.
        ddp_find_unused_parameters=False,
    )
