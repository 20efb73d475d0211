"""``Retention``: λ·KL(base ‖ adapted) on the retention text, added to the loss of each step."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback

from secura_serve.errors import ConfigError
from secura_serve.train.data import IGNORE, Batch, Collator, Rows
from secura_serve.train.loop.loss import answer_logits
from secura_serve.train.methods.prepared import PreparedModel
from secura_serve.train.retention.kept import kept_targets
from secura_serve.train.retention.targets import Targets, bucketed_kl
from secura_serve.train.retention.text import self_written_rows
from secura_serve.train.settings import SELF

__all__ = ["Retention", "mean_retention", "prepare_retention"]


class Retention(TrainerCallback):
    """The objective, and the callback that tells it the step and writes its value into the log.

    Each batch of a step adds ``weight`` times the mean over its tokens of
    :func:`~secura_serve.train.retention.targets.bucketed_kl` (Learning without Forgetting, arXiv
    1606.09282, on text of the base's own, arXiv 2403.01244 and 2602.20162). Which rows a batch
    takes depends on seed, stage, step, accumulated batch and process alone, so that a resumed run
    takes the same ones; all rows are taken once before one is taken again.

    Args:
        rows: the text; what has a label is scored.
        targets: of the base, for all labels of ``rows`` in their order.
        weight: λ.
        batch_size: rows per batch and process.
        pad: id of the padding token.
    """

    def __init__(
        self, rows: Rows, targets: Targets, weight: float, batch_size: int, pad: int, seed: int = 0
    ) -> None:
        self.rows, self.targets, self.weight, self.batch_size = rows, targets, weight, batch_size
        self.collate, self.seed = Collator(pad), seed
        self.stage = 0
        """Number of the task in a sequence of tasks; each has its own order of the rows."""
        counts = [sum(label != IGNORE for label in row["labels"]) for row in rows]
        self._slices = [slice(a, b) for a, b in pairwise(accumulate(counts, initial=0))]
        self._batch, self._process, self._processes = 0, 0, 1
        self._values: list[Tensor] = []

    def chosen(self, batch: int) -> list[int]:
        """Return the rows of a batch, which is counted over steps and accumulated batches."""
        n, size = len(self.rows), self.batch_size
        begin = (batch * self._processes + self._process) * size
        orders: dict[int, list[int]] = {}
        for number in range(begin // n, (begin + size - 1) // n + 1):
            draw = random.Random(f"{self.seed} {self.stage} {number}")
            orders[number] = draw.sample(range(n), n)
        return [orders[at // n][at % n] for at in range(begin, begin + size)]

    def loss(self, model: nn.Module, batch: Batch, logits: Tensor) -> Tensor:
        """Return λ times the mean KL of the next batch of the text, see ``ExtraLoss``."""
        chosen = self.chosen(self._batch)
        self._batch += 1
        text = self.collate([self.rows[i] for i in chosen])
        inputs = {name: value.to(logits.device) for name, value in text.items()}
        # The wrapper of several processes expects one forward pass for each backward pass; the
        # gradients of the model inside are averaged all the same.
        inner = model.module if isinstance(model, DistributedDataParallel) else model
        ours, labels = answer_logits(inner, inputs)
        targets = self.targets.at([self._slices[i] for i in chosen], logits.device)
        value = bucketed_kl(ours[labels != IGNORE], targets).mean()
        self._values.append(value.detach())
        return self.weight * value

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._batch = state.global_step * args.gradient_accumulation_steps
        self._process, self._processes = args.process_index, args.world_size
        self._values = []

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        if logs is None or "loss" not in logs or not self._values:
            return
        value = torch.stack(self._values).mean()
        if args.world_size > 1:
            torch.distributed.all_reduce(value)
            value = value / args.world_size
        logs["retention"] = state.log_history[-1]["retention"] = float(value)


def prepare_retention(prepared: PreparedModel, supplied: Rows | None = None) -> Retention | None:
    """Return the objective of ``prepared.config``, or None with ``retain`` 0; before any training.

    The random numbers of the caller are left as they were.

    Args:
        supplied: the rows of ``retain_data``; None lets the base write them.

    Raises:
        ConfigError: a row is longer than the base's context.
    """
    config = prepared.config
    if not config.retain:
        return None
    length = config.retain_length if supplied is None else 0
    _check_context(prepared, length + 1)
    rows = self_written_rows(prepared) if supplied is None else supplied
    _check_context(prepared, max(len(row["input_ids"]) for row in rows))
    return Retention(
        rows,
        kept_targets(prepared, rows),
        config.retain,
        config.retain_batch_size,
        prepared.tokenizer.pad_token_id,
        config.seed,
    )


def _check_context(prepared: PreparedModel, longest: int) -> None:
    context = getattr(prepared.model.config, "max_position_embeddings", None)
    if context and longest > context:
        name = "retain_length" if prepared.config.retain_data == SELF else "retain_data"
        raise ConfigError(
            f"{name}: the longest row has {longest} tokens or more, the base's context {context}"
        )


def mean_retention(history: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Return ``retention``, the mean over the steps of the KL per token, if it was measured."""
    values = [entry["retention"] for entry in history if "retention" in entry]
    return {"retention": sum(values) / len(values)} if values else {}
