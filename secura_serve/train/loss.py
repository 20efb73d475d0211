"""The loss on the answers alone, for training and on held-out data."""

from __future__ import annotations

import inspect

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn

from secura_serve.train.data import IGNORE, Collator, Rows

__all__ = ["answer_loss", "held_out"]


def answer_loss(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy on the answers of one batch from :class:`Collator`.

    The output layer runs on the columns that hold a label and on the one before them only.

    Returns:
        summed loss (float32), number of right tokens, number of tokens.
    """
    inputs = dict(batch)
    labels = inputs.pop("labels")
    first = int((labels != IGNORE).any(dim=0).nonzero()[0])
    keep = labels.shape[1] - first + 1
    accepted = inspect.signature(_causal_lm(model).forward).parameters
    if "logits_to_keep" in accepted:
        inputs["logits_to_keep"] = keep  # type: ignore[assignment]
    if "position_ids" not in accepted:
        inputs.pop("position_ids")
    logits = model(**inputs, use_cache=False).logits[:, -keep:-1].float()
    wanted = labels[:, first:]
    loss = F.cross_entropy(
        logits.flatten(0, 1), wanted.flatten(), ignore_index=IGNORE, reduction="sum"
    )
    real = wanted != IGNORE
    return loss, ((logits.argmax(-1) == wanted) & real).sum(), real.sum()


def _causal_lm(model: nn.Module) -> nn.Module:
    """The model under a PEFT wrapper."""
    inner: nn.Module = model.get_base_model() if isinstance(model, PeftModel) else model
    return inner


@torch.no_grad()
def held_out(model: nn.Module, rows: Rows, collator: Collator, batch_size: int) -> dict[str, float]:
    """Mean loss per answer token and share of answer tokens that are the most likely one."""
    model.eval()
    device = next(model.parameters()).device
    ordered = sorted(rows, key=lambda row: len(row["input_ids"]))
    total = torch.zeros(3, dtype=torch.float64)
    for start in range(0, len(ordered), batch_size):
        batch = collator(ordered[start : start + batch_size])
        parts = answer_loss(model, {k: v.to(device) for k, v in batch.items()})
        total += torch.tensor([float(p) for p in parts], dtype=torch.float64)
    loss, right, count = total.tolist()
    return {"loss": loss / count, "token_accuracy": right / count}
