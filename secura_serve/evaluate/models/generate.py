"""Greedy answers of a model to a list of prompts, batched by length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from secura_serve.train.data import prompt_ids

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
