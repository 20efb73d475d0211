"""What the base says on neutral text and to the questions: computed once, and kept.

Everything is in float32. In bfloat16 the rounding alone gives a KL of about .002, as much as a good
adapter has in all.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.front.questions import ROOM, Question, questions, right
from secura_serve.evaluate import answers, neutral_texts
from secura_serve.evaluate.models.base import NEUTRAL_TOKENS
from secura_serve.system.atomic import only_writer

__all__ = ["Base", "Drift"]

_BATCH = 8


@dataclass(frozen=True)
class Drift:
    """Means over every predicted token of the neutral text, exact over the whole vocabulary."""

    kl: float
    """KL(base ‖ adapted), nats."""
    perplexity_ratio: float


class Base:
    """The base's part of every measurement, read from ``folder`` or put there.

    Args:
        model: the base in float32, without an adapter; asked only for what is not kept yet.
        key: names the base's weights.
    """

    def __init__(self, model: Callable[[], Any], tokenizer: Any, key: str, folder: Path) -> None:
        self._model, self._tokenizer, self._key, self._folder = model, tokenizer, key, folder

    def _kept(self, name: str, content: Any, make: Callable[[], Any]) -> Any:
        """Return what ``make`` gives for ``content``, from the folder if it is there."""
        text = json.dumps([self._key, content, torch.__version__])
        file = self._folder / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.pt"
        self._folder.mkdir(parents=True, exist_ok=True)
        with only_writer(file, wait=True):
            if not file.exists():
                part = file.with_suffix(".part")
                torch.save(make(), part)
                part.replace(file)
        return torch.load(file, mmap=True)

    def _batches(self) -> list[dict[str, Tensor]]:
        texts = neutral_texts().texts
        ids = [
            self._tokenizer(text, truncation=True, max_length=NEUTRAL_TOKENS)["input_ids"]
            for text in texts
        ]
        ids = sorted((row for row in ids if len(row) > 1), key=len)
        return [
            dict(
                self._tokenizer.pad(
                    {"input_ids": ids[i : i + _BATCH]}, padding_side="right", return_tensors="pt"
                )
            )
            for i in range(0, len(ids), _BATCH)
        ]

    @torch.no_grad()
    def drift(self, model: Any) -> Drift:
        """Compare ``model``, in float32, with the base."""
        batches = self._batches()
        kept = self._kept(
            "neutral",
            [batch["input_ids"].tolist() for batch in batches],
            lambda: [_log_p(self._model(), batch).cpu() for batch in batches],
        )
        kl = nll = 0.0
        tokens = 0
        for batch, before in zip(batches, kept, strict=True):
            after = _log_p(model, batch)
            before = before.to(after.device)
            real = batch["attention_mask"][:, 1:].bool().to(after.device)
            wanted = batch["input_ids"][:, 1:, None].to(after.device)
            kl += float((before.exp() * (before - after)).sum(-1)[real].double().sum())
            nll += float((before - after).gather(-1, wanted)[..., 0][real].double().sum())
            tokens += int(real.sum())
        return Drift(kl / tokens, math.exp(nll / tokens))

    def knows(self) -> list[tuple[Question, str]]:
        """Return the questions that the base answers rightly, and what it says."""
        asked = questions()

        def ask() -> list[str]:
            return answers(
                self._model(), self._tokenizer, [q.text for q in asked], max_new_tokens=ROOM
            )

        said: Sequence[str] = self._kept("answers", [[q.text for q in asked], ROOM], ask)
        return [(q, text) for q, text in zip(asked, said, strict=True) if right(q, text)]


@torch.no_grad()
def _log_p(model: Any, batch: dict[str, Tensor]) -> Tensor:
    device = next(model.parameters()).device
    on_device = {name: value.to(device) for name, value in batch.items()}
    return F.log_softmax(model(**on_device, use_cache=False).logits[:, :-1].float(), dim=-1)
