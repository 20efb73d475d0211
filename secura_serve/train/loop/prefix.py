"""The tokens that all rows of a batch begin with, computed once for all of them.

Rows of one task share the system prompt and often their first words. With a causal model their keys
and values are the same in every row, and so is what their gradient sums to: logits and gradients
are those of the whole batch, up to the order of summation.
"""

from __future__ import annotations

import inspect
from itertools import islice, takewhile
from typing import NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from secura_serve.train.data import IGNORE, Batch
from secura_serve.train.data.batches import Rows

__all__ = ["WORTH", "Shared", "can_share", "causal_lm", "shared_length", "split_prefix"]

WORTH = 64
"""Tokens that must be saved, so that the second forward pass costs less than it saves."""


class Shared(NamedTuple):
    """A batch whose rows begin alike."""

    prefix: Tensor
    """``(1, P)`` int64, the tokens that all rows begin with."""
    rest: Batch
    """``(rows, n)``, what follows them, padded on the left; its mask is ``(rows, P + n)``."""


def causal_lm(model: nn.Module) -> nn.Module:
    """Return the model inside the wrappers of several processes and of PEFT."""
    inner: nn.Module = model.module if isinstance(model, DistributedDataParallel) else model
    inner = inner.get_base_model() if isinstance(inner, PeftModel) else inner
    return inner


def can_share(causal: nn.Module) -> bool:
    """Say whether a causal language model takes earlier keys and values, and looks at all."""
    # The class is asked, because accelerate wraps the method of the instance under autocast.
    accepted = inspect.signature(type(causal).forward).parameters
    config = getattr(causal, "config", None)
    return (
        {"past_key_values", "position_ids", "attention_mask"} <= accepted.keys()
        and getattr(config, "sliding_window", None) is None
        and not getattr(causal, "is_gradient_checkpointing", False)
    )


def shared_length(rows: Rows, count: int) -> int:
    """Return how many tokens every batch of ``count`` of these rows computes once."""
    if count < 2:
        return 0
    first = min(next((i for i, v in enumerate(r["labels"]) if v != IGNORE), 0) for r in rows)
    alike = (len(set(ids)) == 1 for ids in zip(*(r["input_ids"] for r in rows), strict=False))
    length = sum(takewhile(bool, islice(alike, max(0, first - 1))))
    return length if length * (count - 1) >= WORTH else 0


def split_prefix(batch: Batch) -> Shared | None:
    """Cut what all rows begin with off a batch, or return None where that saves too little.

    The token before each row's first label stays, because its logits are needed.

    Args:
        batch: of the collator: padded on the left, with mask and positions, or packed.
    """
    ids, labels = batch["input_ids"], batch["labels"]
    if len(ids) == 1 or "attention_mask" not in batch or "position_ids" not in batch:
        return None
    width = ids.shape[1]
    columns = torch.arange(width, device=ids.device)
    padding = (batch["attention_mask"] == 0).sum(1, keepdim=True)
    aligned = ids.gather(1, (padding + columns).clamp(max=width - 1))
    first = (labels != IGNORE).int().argmax(1) - padding[:, 0]
    alike = (aligned == aligned[:1]).all(0) & (columns < first.min() - 1)
    length = int(alike.int().cumprod(0).sum())
    if length * (len(ids) - 1) < WORTH:
        return None
    rest = {name: batch[name][:, length:] for name in ("input_ids", "labels", "position_ids")}
    own = (columns[length:] >= padding + length).long()
    rest["attention_mask"] = torch.cat([own.new_ones(len(ids), length), own], 1)
    return Shared(aligned[:1, :length], rest)
