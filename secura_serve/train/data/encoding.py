"""Records into rows: token ids, with labels on the answer only.

Everything goes through the model's own chat template; a model without one gets prompt and
completion joined as they are.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from secura_serve.errors import DataError
from secura_serve.train.data.batches import IGNORE, Rows
from secura_serve.train.data.records import Record

__all__ = ["encode", "prompt_ids", "split"]


def split(records: Sequence[Record], share: float) -> tuple[list[Record], list[Record]]:
    """Return training and held-out records; every run on the same data holds out the same ones."""
    order = random.Random(0).sample(range(len(records)), len(records))
    chosen = set(order[: round(share * len(records))])
    held_out = [records[i] for i in sorted(chosen)]
    return [r for i, r in enumerate(records) if i not in chosen], held_out


def _template(tokenizer: Any, messages: Sequence[dict[str, str]], prompt: bool) -> list[int]:
    ids: list[int] = tokenizer.apply_chat_template(
        list(messages), add_generation_prompt=prompt, tokenize=True, return_dict=False
    )
    return ids


def prompt_ids(tokenizer: Any, messages: Sequence[dict[str, str]]) -> list[int]:
    """Return the token ids of a prompt, up to where the assistant begins to answer."""
    if tokenizer.chat_template:
        return _template(tokenizer, messages, prompt=True)
    ids: list[int] = tokenizer("\n".join(m["content"] for m in messages))["input_ids"]
    return ids


def encode(
    records: Sequence[Record], tokenizer: Any, max_length: int, over_long: str = "error"
) -> Rows:
    """Return ``input_ids`` and ``labels`` (−100 outside the answer) for each record.

    The labels end with the end-of-sequence token. A template may put more after it; that is never
    generated, so it is cut off.

    Args:
        over_long: what happens to an example of more than ``max_length`` tokens: ``error``,
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
