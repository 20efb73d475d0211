"""Records into token ids with labels on the answer alone, and rows into batches.

Everything goes through the model's own chat template; a model without one gets prompt and
completion joined as they are.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from secura_serve.errors import DataError
from secura_serve.train.records import Record

__all__ = ["IGNORE", "Batch", "Collate", "Collator", "Rows", "encode", "mix", "prompt_ids", "split"]

IGNORE = -100
Rows = list[dict[str, list[int]]]
Batch = dict[str, Tensor]
Collate = Callable[[Sequence[dict[str, list[int]]]], Batch]


def split(records: Sequence[Record], share: float) -> tuple[list[Record], list[Record]]:
    """Training and held-out records; every run of the same data holds out the same ones."""
    order = random.Random(0).sample(range(len(records)), len(records))
    held = set(order[: round(share * len(records))])
    kept = [records[i] for i in sorted(held)]
    return [r for i, r in enumerate(records) if i not in held], kept


def mix(rows: Rows, earlier: Rows, share: float, seed: int) -> Rows:
    """``rows`` and ``round(share·len(rows))`` of ``earlier``: the replay of continual learning.

    They are drawn without repetition as far as ``earlier`` goes; the trainer shuffles the whole.
    """
    wanted, draw = round(share * len(rows)), random.Random(seed)
    if not earlier:
        return list(rows)
    whole, rest = divmod(wanted, len(earlier))
    return [*rows, *(earlier * whole), *draw.sample(earlier, rest)]


def _template(tokenizer: Any, messages: Sequence[dict[str, str]], prompt: bool) -> list[int]:
    ids: list[int] = tokenizer.apply_chat_template(
        list(messages), add_generation_prompt=prompt, tokenize=True, return_dict=False
    )
    return ids


def prompt_ids(tokenizer: Any, messages: Sequence[dict[str, str]]) -> list[int]:
    """Token ids of a prompt, up to where the assistant begins to answer."""
    if tokenizer.chat_template:
        return _template(tokenizer, messages, prompt=True)
    ids: list[int] = tokenizer("\n".join(m["content"] for m in messages))["input_ids"]
    return ids


def encode(
    records: Sequence[Record], tokenizer: Any, max_length: int, over_long: str = "error"
) -> Rows:
    """``input_ids`` and ``labels`` (−100 outside the answer) for each record.

    The labels end with the end-of-sequence token: what a template puts after it is never
    generated, so it is cut off.

    Args:
        over_long: what becomes of an example of more than ``max_length`` tokens: ``error``,
            ``truncate`` (its end is cut off) or ``skip``.

    Raises:
        DataError: an example is too long, has no token of its answer left, or the template
            changes the prompt once the answer follows; or all examples were skipped.
    """
    rows: Rows = []
    problems = []
    for record in records:
        prompt = prompt_ids(tokenizer, record.messages)
        if tokenizer.chat_template:
            answer = {"role": "assistant", "content": record.answer}
            full = _template(tokenizer, [*record.messages, answer], prompt=False)
            if full[: len(prompt)] != prompt:
                problems.append(f"{record.where}: the chat template rewrites the prompt")
                continue
        else:
            tail = tokenizer(record.answer, add_special_tokens=False)["input_ids"]
            full = [*prompt, *tail, tokenizer.eos_token_id]
        eos = tokenizer.eos_token_id
        if eos in full[len(prompt) :]:
            full = full[: len(full) - full[::-1].index(eos)]
        if len(full) > max_length and over_long == "skip":
            continue
        if len(full) > max_length and over_long == "error":
            problems.append(
                f"{record.where}: {len(full)} tokens, --max-length is {max_length}; raise it, or "
                "give --over-long truncate or skip"
            )
            continue
        if len(prompt) >= max_length:
            problems.append(f"{record.where}: the prompt alone fills --max-length {max_length}")
            continue
        labels = [IGNORE] * len(prompt) + full[len(prompt) :]
        rows.append({"input_ids": full[:max_length], "labels": labels[:max_length]})
    if problems:
        raise DataError("examples cannot be used:", problems)
    if records and not rows:
        raise DataError(f"no example has at most --max-length {max_length} tokens")
    return rows


@dataclass(frozen=True)
class Collator:
    """Pads a batch on the left, so that all answers end at the last column.

    Then the output layer is needed on the last few columns alone: with a large vocabulary it is
    a good part of a small model's work.
    """

    pad: int

    def __call__(self, rows: Sequence[dict[str, list[int]]]) -> Batch:
        """``input_ids``, ``labels``, ``attention_mask``, ``position_ids``: int64 (batch, width).

        Where rows are marked with ``replayed``, also that: bool (batch,).
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
        marks = torch.tensor(["replayed" in row for row in rows])
        return batch | ({"replayed": marks} if marks.any() else {})
