"""Packing: the examples of a batch laid end to end in one row, without padding.

A token must see only its own example: positions start at 0 again with every example, and
transformers builds its attention mask from that. Whether a model does so is tested, not assumed.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import DataCollatorWithFlattening

from secura_serve.errors import ConfigError
from secura_serve.train.data import Batch, Collate, Collator, Rows
from secura_serve.train.loop.loss import answer_logits

__all__ = ["packer"]

_TEST_TOKENS = 32
# Far above the effect of another order of summation, far below that of a token of another example.
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 0.3}


def packer(model: Any, rows: Rows, padded: Collator) -> Collate:
    """Return a collator of packed batches: ``input_ids``, ``labels``, ``position_ids`` (1, tokens).

    Raises:
        ConfigError: the model lets examples in one row see each other: its logits on two short
            examples differ between a packed row and a padded batch.
    """
    flatten = DataCollatorWithFlattening()

    def collate(batch: Any) -> Batch:
        packed: Batch = flatten(batch)
        return packed

    # Answers throughout, so that all logits are compared.
    pair = [
        {"input_ids": ids, "labels": ids}
        for ids in (r["input_ids"][:_TEST_TOKENS] for r in rows[:2])
    ]
    pair = (pair * 2)[:2]
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    logits = []
    with torch.no_grad():
        for batch in (collate(pair), padded([pair[1]])):
            batch["labels"][0, 0] = -100
            predicted, _ = answer_logits(model, {k: v.to(device) for k, v in batch.items()})
            logits.append(predicted[0, -len(pair[1]["input_ids"]) + 1 :])
    model.train(training)
    difference = float((logits[0] - logits[1]).abs().max())
    if difference > _TOLERANCE[next(model.parameters()).dtype]:
        raise ConfigError(
            f"--packing: {type(model).__name__} lets packed examples see each other (logits differ "
            f"by {difference:.3g}); leave it out"
        )
    return collate
