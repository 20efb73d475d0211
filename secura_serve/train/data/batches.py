"""Rows of token ids, and the batches that the model gets."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["IGNORE", "Batch", "Collate", "Collator", "Rows", "mix"]

IGNORE = -100
"""The label of a token that is not part of the answer."""
Rows = list[dict[str, list[int]]]
"""Encoded examples, each with ``input_ids`` and ``labels``."""
Batch = dict[str, Tensor]
Collate = Callable[[Sequence[dict[str, list[int]]]], Batch]


def mix(rows: Rows, earlier: Rows, share: float, seed: int) -> Rows:
    """Return ``rows`` followed by ``round(share·len(rows))`` of ``earlier``, for replay.

    A row of ``earlier`` is drawn twice only after all the others have been drawn once. The trainer
    shuffles the result.
    """
    wanted, draw = round(share * len(rows)), random.Random(seed)
    if not earlier:
        return list(rows)
    times, rest = divmod(wanted, len(earlier))
    return [*rows, *(earlier * times), *draw.sample(earlier, rest)]


@dataclass(frozen=True)
class Collator:
    """Pads a batch on the left, so that all answers end at the last column.

    The output layer is then needed for the last few columns only. With a large vocabulary that
    layer is a good part of a small model's work.

    Args:
        pad: id of the padding token.
    """

    pad: int

    def __call__(self, rows: Sequence[dict[str, list[int]]]) -> Batch:
        """Return a batch of ``input_ids``, ``labels``, ``attention_mask`` and ``position_ids``.

        All are int64 (batch, width). Where rows are marked as ``replayed``, the batch also holds
        that: bool (batch,).
        """
        width = max(len(row["input_ids"]) for row in rows)
        ids = torch.full((len(rows), width), self.pad)
        labels = torch.full((len(rows), width), IGNORE)
        mask = torch.zeros(len(rows), width, dtype=torch.int64)
        for i, row in enumerate(rows):
            n = len(row["input_ids"])
            ids[i, width - n :] = torch.tensor(row["input_ids"])
            labels[i, width - n :] = torch.tensor(row["labels"])
            mask[i, width - n :] = 1
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        batch = {
            "input_ids": ids,
            "labels": labels,
            "attention_mask": mask,
            "position_ids": positions,
        }
        replayed = torch.tensor(["replayed" in row for row in rows])
        return batch | ({"replayed": replayed} if replayed.any() else {})
