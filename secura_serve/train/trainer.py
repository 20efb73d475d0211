"""One training run: base, data and settings in, an adapter folder out."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging as hf_logging

from secura_serve.adapter import check_name
from secura_serve.bases import resolve_base
from secura_serve.config import TrainConfig
from secura_serve.errors import ConfigError, SecuraError
from secura_serve.train import SecuraConfig
from secura_serve.train.data import Collator, Record, encode, read_jsonl
from secura_serve.train.loss import answer_loss, held_out

__all__ = ["Run", "load_base", "train"]


@dataclass(frozen=True)
class Run:
    """A finished run: the model with its adapter, and what was measured."""

    model: PeftModel
    tokenizer: Any
    model_id: str
    scores: dict[str, float]
    seconds: float


def load_base(name: str, dtype: str, device: str = "auto") -> tuple[Any, Any, str]:
    """The base model, its tokenizer and the id that an adapter records."""
    base = resolve_base(name)
    tokenizer = AutoTokenizer.from_pretrained(base.path)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    capped = getattr(AutoConfig.from_pretrained(base.path), "attn_logit_softcapping", None)
    model = AutoModelForCausalLM.from_pretrained(
        base.path,
        dtype=getattr(torch, dtype),
        # Gemma 2: transformers' faster attention leaves the soft-capping out.
        attn_implementation="eager" if capped else None,
    )
    if device == "auto" and torch.cuda.is_available():
        model = model.to("cuda")
    return model, tokenizer, base.model_id


class _Trainer(Trainer):
    """transformers' Trainer with the loss on the answers alone."""

    loss_is_scaled_for_ga = False

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        loss, _, count = answer_loss(model, inputs)
        return (loss / count, {}) if return_outputs else loss / count


def _split(config: TrainConfig) -> tuple[list[Record], list[Record]]:
    """Training and held-out records."""
    records = read_jsonl(config.data)
    if config.eval_data:
        kept = read_jsonl(config.eval_data)
    else:
        # Seeded apart from the run, so that every run of a file holds out the same lines.
        order = random.Random(0).sample(range(len(records)), len(records))
        cut = round(config.eval_split * len(records))
        held = set(order[:cut])
        kept = [records[i] for i in sorted(held)]
        records = [r for i, r in enumerate(records) if i not in held]
    if not records:
        raise ConfigError(f"eval_split {config.eval_split} leaves no training data")
    return records, kept


def _adapt(model: Any, config: SecuraConfig) -> Any:
    """get_peft_model; PEFT's own complaint about targets becomes ours."""
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        if isinstance(error, SecuraError):
            raise
        raise ConfigError(f"--targets: {error}".partition("\n")[0]) from error


def train(config: TrainConfig, *, log: Sequence[Any] = ()) -> Run:
    """Train one adapter; nothing is written (see :func:`secura_serve.train.card.write`).

    The same settings, data, thread count and versions give the same adapter. ``log`` takes
    transformers ``TrainerCallback`` objects.

    Raises:
        ConfigError, DataError, BaseModelError: before the training starts.
    """
    out = Path(config.out)
    check_name(out.absolute().name)
    if out.exists() and not config.overwrite:
        raise ConfigError(f"{out} exists; choose another --out or give --overwrite")
    records, held = _split(config)
    set_seed(config.seed)
    hf_logging.set_verbosity_error()
    model, tokenizer, model_id = load_base(config.base, config.dtype, config.device)
    rows = encode(records, tokenizer, config.max_length)
    kept = encode(held, tokenizer, config.max_length)
    # PEFT records what the model says, which is the local folder.
    model.name_or_path = model_id
    norm = {"mode": config.magnorm} | ({"tau": config.tau} if config.magnorm == "bounded" else {})
    tuned = _adapt(
        model,
        SecuraConfig(
            task_type="CAUSAL_LM",
            base_model_name_or_path=model_id,
            r=config.rank,
            target_modules=config.target_modules(),
            alpha=config.alpha_value(),
            selection={"rule": config.selection, "seed": config.selection_seed},
            core=config.core,
            inner_rank=config.inner_rank,
            init=config.init,
            magnorm=None if config.magnorm == "none" else norm,
        ),
    )
    collator = Collator(tokenizer.pad_token_id)
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            per_device_train_batch_size=config.batch_size,
            gradient_accumulation_steps=config.accumulate,
            learning_rate=config.lr,
            lr_scheduler_type=config.schedule,
            warmup_steps=config.warmup,
            weight_decay=config.weight_decay,
            num_train_epochs=config.epochs,
            max_steps=config.max_steps,
            seed=config.seed,
            train_sampling_strategy="group_by_length",
            remove_unused_columns=False,
            save_strategy="no",
            report_to=[],
            disable_tqdm=False,
            logging_steps=10,
            use_cpu=config.device == "cpu" or not torch.cuda.is_available(),
            dataloader_pin_memory=False,
        )
        trainer = _Trainer(
            model=tuned,
            args=arguments,
            train_dataset=rows,
            data_collator=collator,
            callbacks=list(log),
        )
        result = trainer.train()
    scores = {"train_loss": float(result.training_loss), "steps": float(result.global_step)}
    if kept:
        found = held_out(tuned, kept, collator, config.batch_size)
        scores |= {f"held_out_{name}": value for name, value in found.items()}
    return Run(tuned, tokenizer, model_id, scores, float(result.metrics["train_runtime"]))
