"""The loss on the answers only, in training and on held-out data."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm
from transformers import DynamicCache

from secura_serve.train.data import IGNORE, Batch, Collate, Rows
from secura_serve.train.loop.prefix import can_share, causal_lm, split_prefix
from secura_serve.train.output.checkpoints import is_main_process

__all__ = ["ExtraLoss", "answer_logits", "score_rows", "summed_cross_entropy"]

ExtraLoss = Callable[[nn.Module, Batch, Tensor], Tensor]
"""``(model, batch, logits) -> scalar``, added to the mean cross-entropy of each step.

``logits`` are those of :func:`answer_logits`; call that for the logits of a second model on the
same batch. ``batch`` comes from the collator, with its labels.
"""


def answer_logits(
    model: nn.Module, batch: Batch, forward: Callable[..., Any] | None = None
) -> tuple[Tensor, Tensor]:
    """Return the logits that predict the answers of one batch, and the tokens they should predict.

    The output layer runs only on the columns that hold a label and on the one before them. What
    all rows begin with is computed once, see :mod:`secura_serve.train.loop.prefix`.

    Args:
        forward: called in place of ``model``, with its arguments.

    Returns:
        logits (rows, n, vocabulary) float32, and labels (rows, n) int64, −100 outside the answer;
        n counts the columns from the first one that holds a label.
    """
    causal = causal_lm(model)
    # The class is asked, because accelerate wraps the method of the instance under autocast.
    accepted = inspect.signature(type(causal).forward).parameters
    inputs: dict[str, Any] = dict(batch)
    cached = False
    if can_share(causal) and (shared := split_prefix(batch)):
        cache = DynamicCache()
        # Not DistributedDataParallel itself, which expects one forward pass for each backward
        # pass; the gradients of the model inside are averaged all the same.
        inner = model.module if isinstance(model, DistributedDataParallel) else model
        keep_one = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        call = forward or inner
        call(input_ids=shared.prefix, past_key_values=cache, use_cache=True, **keep_one)
        cache.batch_repeat_interleave(len(batch["input_ids"]))
        inputs = {**shared.rest, "past_key_values": cache}
        cached = True
    labels = inputs.pop("labels")
    inputs.pop("replayed", None)
    first = int((labels != IGNORE).any(dim=0).nonzero()[0])
    keep = labels.shape[1] - first + 1
    if "logits_to_keep" in accepted:
        inputs["logits_to_keep"] = keep
    if "position_ids" not in accepted:
        inputs.pop("position_ids", None)
    logits = (forward or model)(**inputs, use_cache=cached).logits[:, -keep:-1].float()
    return logits, labels[:, first:]


def summed_cross_entropy(logits: Tensor, wanted: Tensor) -> Tensor:
    """Return the cross-entropy summed over the labels, float32."""
    return F.cross_entropy(
        logits.flatten(0, 1), wanted.flatten(), ignore_index=IGNORE, reduction="sum"
    )


@torch.no_grad()
def score_rows(
    model: nn.Module,
    rows: Rows,
    collate: Collate,
    batch_size: int,
    reduce: Callable[[Tensor], Tensor] = lambda total: total,
) -> dict[str, float]:
    """Measure how well a model predicts the answers of ``rows``.

    Args:
        reduce: adds up five sums (float64) over the processes, which have different rows.

    Returns:
        ``loss``: mean per answer token. ``token_accuracy``: share of answer tokens that are the
        most likely one. ``exact_match``: share of answers all of whose tokens are, the
        end-of-sequence token included. Those are the answers that greedy decoding gives token for
        token, because it departs from an answer where a token is not the most likely one.
    """
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    ordered = sorted(rows, key=lambda row: len(row["input_ids"]))
    total = torch.zeros(5, dtype=torch.float64)
    starts = range(0, len(ordered), batch_size)
    quiet = not is_main_process()
    for start in tqdm(starts, "scoring", leave=False, unit="batch", delay=2, disable=quiet):
        batch = collate(ordered[start : start + batch_size])
        logits, wanted = answer_logits(model, {k: v.to(device) for k, v in batch.items()})
        real, right = wanted != IGNORE, logits.argmax(-1) == wanted
        parts = [summed_cross_entropy(logits, wanted), (right & real).sum(), real.sum()]
        whole = (right | ~real).all(1)
        parts += [whole.sum(), torch.tensor(len(whole))]
        total += torch.tensor([float(p) for p in parts], dtype=torch.float64)
    model.train(training)
    loss, tokens, count, exact, answers = reduce(total).tolist()
    return {
        "loss": loss / count,
        "token_accuracy": tokens / count,
        "exact_match": exact / answers,
    }
