"""Text that a base writes by itself: what it says while nobody asks for a task.

What an adapter changes on such text is what the base loses. No data set is needed, and no row of a
benchmark can slip in. (Self-synthesized rehearsal, arXiv 2403.01244.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor
from tqdm import tqdm
from transformers import GenerationConfig

from secura_serve.errors import ConfigError

__all__ = ["BaseText", "sample_base_text"]

_MARK = "\ue000"
_WITHOUT = "train with --coordinates plain, and --retain with --retain-data FILE"


@dataclass(frozen=True)
class BaseText:
    """Sampled token rows."""

    tokens: Tensor
    """``(sequences, start + length)`` int64."""
    start: int
    """Leading tokens of each row that were given to the base and not written by it."""


@torch.no_grad()
def sample_base_text(
    model: Any,
    tokenizer: Any,
    *,
    sequences: int = 256,
    length: int = 96,
    seed: int = 0,
    batch_size: int = 32,
) -> BaseText:
    """Let the base write, from where its chat template begins a user's turn.

    So it writes the user's message, and then its own answer. Each token is drawn from the whole
    distribution (temperature 1, no truncation). The same seed, model, dtype and number of threads
    give the same tokens; the random numbers of the caller are left as they were.

    Args:
        model: the causal language model with its adapters disabled.
        sequences, length: how many rows, and how many tokens the base writes in each.
    """
    prompt = _beginning(tokenizer)
    settings = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=length,
        min_new_tokens=length,
        pad_token_id=tokenizer.pad_token_id,
    )
    rows = []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for begin in tqdm(range(0, sequences, batch_size), "the base writes", unit="batch"):
            ids = prompt.expand(min(batch_size, sequences - begin), -1).to(model.device)
            written = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                generation_config=settings,
            )
            rows.append(written.cpu())
    return BaseText(torch.cat(rows), prompt.shape[1])


def _beginning(tokenizer: Any) -> Tensor:
    """Return the tokens ``(1, n)`` in front of a user's message, or the first token of a text.

    Raises:
        ConfigError: the base's template takes no message of a user alone, or no token begins a
            text.
    """
    ids: list[int] = []
    if tokenizer.chat_template:
        turn = [{"role": "user", "content": _MARK}]
        try:
            before = tokenizer.apply_chat_template(turn, tokenize=False).partition(_MARK)[0]
        except TemplateError as error:
            raise ConfigError(
                f"the base cannot write text by itself: its chat template says {error}; {_WITHOUT}"
            ) from error
        ids = tokenizer(before, add_special_tokens=False)["input_ids"]
    # A template may begin with the message itself, as DialoGPT's does.
    if not ids:
        firsts = [i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None]
        if not firsts:
            raise ConfigError(
                "the base cannot write text by itself: its tokenizer has no token that begins a "
                f"text (bos_token, eos_token); {_WITHOUT}"
            )
        ids = firsts[:1]
    return torch.tensor([ids], dtype=torch.int64)
