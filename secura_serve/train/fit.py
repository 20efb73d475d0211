"""Fitting a prepared model to rows: once in a run, once per task in continual learning."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    EarlyStoppingCallback,
    PrinterCallback,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)

from secura_serve.train.callbacks import Divergence, Interrupt, Progress
from secura_serve.train.checkpoints import processes
from secura_serve.train.data import Collate, Collator, Rows
from secura_serve.train.loss import ExtraLoss
from secura_serve.train.methods import Tuned
from secura_serve.train.packing import packer
from secura_serve.train.settings import TrainConfig
from secura_serve.train.trainer import AnswerTrainer

__all__ = ["Fit", "Interrupted", "fit"]


@dataclass(frozen=True)
class Fit:
    """What one :func:`fit` measured."""

    steps: int
    train_loss: float
    """Mean over the steps of the mean cross-entropy per answer token, and of any extra loss."""
    held_out: dict[str, float]
    best: int | None
    """The step that was kept, with ``patience``."""
    seconds: float
    tokens: int
    history: list[dict[str, Any]]
    """One entry per step and per evaluation, as transformers logs them."""


class Interrupted(KeyboardInterrupt):
    """The run ended early on a signal; ``checkpoint`` is where it can go on from."""

    def __init__(self, step: int, steps: int, checkpoint: Path | None) -> None:
        super().__init__(f"interrupted at step {step} of {steps}")
        self.checkpoint = checkpoint


def fit(
    tuned: Tuned,
    rows: Rows,
    *,
    config: TrainConfig | None = None,
    held: Rows | None = None,
    extra_loss: ExtraLoss | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    run_dir: Path | None = None,
    resume: Path | None = None,
) -> Fit:
    """Train ``tuned.model`` in place on ``rows``, from the weights it has, with a fresh optimiser.

    It can be called again and again on one model: that is continual learning, one list of rows
    per task. Its building blocks::

        tuned = prepare(config)                              # base and adapter, once
        for task in tasks:
            rows = encode(read(task), tuned.tokenizer, config.max_length)
            fit(tuned, mix(rows, seen, 0.2, seed=0),         # replay: a share of earlier rows
                extra_loss=lambda model, batch, logits: ...)  # EWC, distillation
            seen += rows

    The loss of an optimiser step is the sum of the cross-entropies of its answer tokens divided
    by their number, over all accumulated batches and all processes, plus the mean over the
    batches of ``extra_loss(model, batch, logits)`` (see :data:`ExtraLoss`). The order of the rows
    depends on ``config.seed`` and the epoch alone.

    Args:
        config: settings of this call, ``tuned.config`` by default. Only what concerns the
            training is read: steps, batches, learning rate, seed, evaluation, checkpoints.
        held: held-out rows, for ``eval_steps``, ``patience`` and the scores at the end.
        callbacks: further transformers callbacks.
        run_dir: folder of checkpoints; None writes none.
        resume: checkpoint to go on from.

    Raises:
        Interrupted: on Ctrl-C or SIGTERM, after a checkpoint where there is a ``run_dir``.
        ConfigError: ``resume`` belongs to another method or base, or the model cannot be packed.
        TrainingError: the loss is no number any more, or a checkpoint cannot be written.
    """
    config, held = config or tuned.config, held or []
    padded = Collator(tuned.tokenizer.pad_token_id)
    collate: Collate = packer(tuned.model, rows, padded) if config.packing else padded
    bar = Progress()
    watch = [*callbacks, bar, Divergence(), *_fusion(config)]
    if config.patience:
        watch.append(EarlyStoppingCallback(config.patience))
    alone = processes() == 1
    interrupt = Interrupt()
    with (
        nullcontext(str(run_dir)) if run_dir else tempfile.TemporaryDirectory() as folder,
        # Several processes could not agree on the step to stop at: there a signal acts at once.
        interrupt if alone else nullcontext(),
    ):
        trainer = AnswerTrainer(
            model=tuned.model,
            args=_arguments(config, folder, bool(run_dir), bool(held)),
            train_dataset=rows,
            eval_dataset=held or None,
            data_collator=collate,
            callbacks=[*watch, interrupt],
            padded=padded,
            extra_loss=extra_loss,
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
        scores = _scores_at(best or state.global_step, state) if held else {}
        if held and not scores:
            scores = trainer.held_out_scores()
            state.log_history.append(
                {"step": state.global_step} | {f"eval_{k}": v for k, v in scores.items()}
            )
    losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
    return Fit(
        best=best,
        steps=state.global_step,
        train_loss=sum(losses) / len(losses),
        held_out=scores,
        seconds=float(result.metrics["train_runtime"]),
        tokens=int(state.num_input_tokens_seen),
        history=state.log_history,
    )


def _scores_at(step: int, state: TrainerState) -> dict[str, float]:
    """What the evaluation after ``step`` found; empty if there was none."""
    for entry in state.log_history:
        if entry["step"] == step and "eval_loss" in entry:
            found = {k: v for k, v in entry.items() if k.startswith("eval_")}
            return {key.removeprefix("eval_"): value for key, value in found.items()}
    return {}


def _fusion(config: TrainConfig) -> list[TrainerCallback]:
    if not config.fusion_step:
        return []
    from secura_serve.train.fusion import Fusion

    return [Fusion(config.fusion_step)]


def _arguments(config: TrainConfig, folder: str, keep: bool, held: bool) -> TrainingArguments:
    best = bool(config.patience and held)
    every = config.eval_steps if best else config.save_steps
    return TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulate,
        learning_rate=config.lr,
        lr_scheduler_type=config.schedule,
        warmup_steps=config.warmup,
        weight_decay=config.weight_decay,
        num_train_epochs=config.epochs,
        max_steps=config.max_steps,
        seed=config.seed,
        remove_unused_columns=False,
        eval_strategy="steps" if held and config.eval_steps else "no",
        eval_steps=config.eval_steps or None,
        # The best model comes back from its checkpoint.
        save_strategy="steps" if (keep and config.save_steps) or best else "no",
        save_steps=max(every, 1),
        # The newest may be half written when a run is killed.
        save_total_limit=2,
        load_best_model_at_end=best,
        metric_for_best_model="loss" if best else None,
        greater_is_better=False if best else None,
        restore_callback_states_from_checkpoint=True,
        include_num_input_tokens_seen="non_padding",
        report_to=[],
        # Progress is the bar, and would be taken for the trainer's own.
        disable_tqdm=True,
        logging_steps=1,
        logging_nan_inf_filter=False,
        use_cpu=config.device == "cpu" or not torch.cuda.is_available(),
        bf16=config.method == "full" and config.dtype == "bfloat16",
        dataloader_pin_memory=False,
        # Whatever is trained takes part in every step.
        ddp_find_unused_parameters=False,
    )
