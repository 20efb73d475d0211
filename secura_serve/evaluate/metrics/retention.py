"""How far an adapter moved the model on text that has nothing to do with its task."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

__all__ = ["Retention", "retention"]


@dataclass(frozen=True)
class Retention:
    """Means over every predicted token of the neutral text."""

    kl: float
    """KL(base ‖ adapted) per token, nats; 0 is untouched."""
    perplexity_ratio: float
    """Perplexity of the adapted model over that of the base; 1 is untouched."""
    base_perplexity: float
    tokens: int


@torch.no_grad()
def retention(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    max_tokens: int = 64,
    batch_size: int = 4,
    without: Callable[[], AbstractContextManager[Any]] | None = None,
) -> Retention:
    """Compare a model with and without its adapter on ``texts``, cut to ``max_tokens``.

    Args:
        without: a context in which the model is its base; by default that of a PEFT model.

    Peak memory: two float32 ``(batch_size · max_tokens, vocabulary)`` matrices and a few copies.
    """
    model.eval()
    device = next(model.parameters()).device
    without = without or model.disable_adapter
    ids = [tokenizer(t, truncation=True, max_length=max_tokens)["input_ids"] for t in texts]
    ids = sorted((row for row in ids if len(row) > 1), key=len)
    kl = base_nll = nll = 0.0
    tokens = 0
    for start in range(0, len(ids), batch_size):
        batch = tokenizer.pad(
            {"input_ids": ids[start : start + batch_size]},
            padding_side="right",
            return_tensors="pt",
        ).to(device)
        with without():
            before = F.log_softmax(model(**batch, use_cache=False).logits[:, :-1].float(), dim=-1)
        after = F.log_softmax(model(**batch, use_cache=False).logits[:, :-1].float(), dim=-1)
        real = batch["attention_mask"][:, 1:].bool()
        wanted = batch["input_ids"][:, 1:, None]
        kl += float((before.exp() * (before - after)).sum(-1)[real].double().sum())
        base_nll -= float(before.gather(-1, wanted)[..., 0][real].double().sum())
        nll -= float(after.gather(-1, wanted)[..., 0][real].double().sum())
        tokens += int(real.sum())
    return Retention(
        kl=kl / tokens,
        perplexity_ratio=math.exp((nll - base_nll) / tokens),
        base_perplexity=math.exp(base_nll / tokens),
        tokens=tokens,
    )
