"""Greedy answers of a model to a list of prompts, batched by length."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache

from secura_serve.train.data import prompt_ids
from secura_serve.train.loop.prefix import WORTH, can_share, causal_lm

__all__ = ["answers"]


@torch.no_grad()
def answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    batch_size: int = 32,
) -> list[str]:
    """Return one greedy answer per prompt, asked as the user through the chat template."""
    model.eval()
    device = next(model.parameters()).device
    ids = [prompt_ids(tokenizer, [{"role": "user", "content": p}]) for p in prompts]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    texts_in_order = [""] * len(ids)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = tokenizer.pad(
            {"input_ids": [ids[i] for i in chosen]}, padding_side="left", return_tensors="pt"
        ).to(device)
        batch = _with_prefix(model, dict(batch), [ids[i] for i in chosen])
        out = model.generate(
            **batch,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            use_cache=True,
            pad_token_id=tokenizer.pad_token_id,
        )
        texts = tokenizer.batch_decode(
            out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True
        )
        for i, text in zip(chosen, texts, strict=True):
            texts_in_order[i] = text.strip()
    return texts_in_order


def _with_prefix(model: Any, batch: dict[str, Any], ids: list[list[int]]) -> dict[str, Any]:
    """Compute what all prompts begin with once, and put the padding behind it.

    Args:
        batch: ``input_ids`` and ``attention_mask``, padded on the left.
    """
    causal = causal_lm(model)
    alike = len(os.path.commonprefix(ids))
    # The last token of each prompt predicts the first of the answer.
    length = min(alike, min(map(len, ids)) - 1)
    if length * (len(ids) - 1) < WORTH or not can_share(causal):
        return batch
    width = batch["input_ids"].shape[1]
    prefix = batch["input_ids"].new_tensor([ids[0][:length]])
    cache = DynamicCache()
    model(input_ids=prefix, past_key_values=cache, use_cache=True)
    cache.batch_repeat_interleave(len(ids))
    whole = prefix.expand(len(ids), -1)
    rest = batch["input_ids"][:, length:]
    columns = torch.arange(length, width, device=rest.device)
    padding = (batch["attention_mask"] == 0).sum(1, keepdim=True)
    mask = (columns >= padding + length).long()
    return {
        "input_ids": torch.cat([whole, rest], 1),
        "attention_mask": torch.cat([torch.ones_like(whole), mask], 1),
        "past_key_values": cache,
    }
