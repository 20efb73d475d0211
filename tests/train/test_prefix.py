"""Proves that what all rows of a batch begin with is computed once, and that logits, gradients and
greedy answers are those of the padded batch, on Llama, biased Qwen2 and GPT-2.

Needs transformers and peft; tiny random models in float64.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import BatchEncoding
from transformers.pytorch_utils import Conv1D

from secura_serve.evaluate import answers
from secura_serve.train import adapter_layers
from secura_serve.train.data import Collator, Rows
from secura_serve.train.loop.loss import answer_logits, summed_cross_entropy
from secura_serve.train.loop.prefix import can_share, split_prefix
from tests.support.tuning import SHAPES, VOCAB, base, tuned

COMMON = 40


def rows(common: int = COMMON, count: int = 4) -> Rows:
    draw = torch.Generator().manual_seed(3)
    start = torch.randint(3, VOCAB, (common,), generator=draw).tolist()
    made = []
    for number in range(count):
        own = torch.randint(3, VOCAB, (3 + 2 * number,), generator=draw).tolist()
        labels = [-100] * (common + len(own) - 2) + own[-2:]
        made.append({"input_ids": start + own, "labels": labels})
    return made


def gradients(model: Any) -> list[torch.Tensor]:
    model.zero_grad()
    loss = summed_cross_entropy(*answer_logits(model, Collator(0)(rows())))
    loss.backward()
    cores = [layer.secura_U["default"].grad for layer in adapter_layers(model, "default").values()]
    return [loss.detach(), *cores]


@pytest.mark.parametrize("arch", list(SHAPES))
def test_logits_and_gradients_are_those_of_the_whole_batch(
    arch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tuned(base(arch))
    widths: list[int] = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    shared = gradients(model)
    longest = max(len(row["input_ids"]) for row in rows())
    assert widths == [COMMON, longest - COMMON]
    monkeypatch.setattr("secura_serve.train.loop.loss.split_prefix", lambda batch: None)
    for ours, wanted in zip(shared, gradients(model), strict=True):
        # The logits are float32 in both.
        torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-6)
    assert widths[2:] == [longest]


@pytest.mark.parametrize(
    ("common", "count", "expected"),
    [(40, 4, 40), (40, 1, None), (20, 4, None), (22, 4, 22)],
    ids=["shared", "one row", "too little", "just enough"],
)
def test_a_prefix_is_cut_off_where_that_saves_enough(
    common: int, count: int, expected: int | None
) -> None:
    found = split_prefix(Collator(0)(rows(common, count)))
    assert (found.prefix.shape[1] if found else None) == expected


def test_the_token_before_a_label_stays() -> None:
    alike = [{"input_ids": [5] * 60, "labels": [-100] * 50 + [5] * 10} for _ in range(8)]
    found = split_prefix(Collator(0)(alike))
    assert found and found.prefix.shape[1] == 49
    assert found.rest["attention_mask"].shape == (8, 60)


def test_windows_are_not_shared() -> None:
    model = base()
    assert can_share(model)
    model.config.sliding_window = 16
    assert not can_share(model)


@pytest.mark.parametrize("arch", list(SHAPES))
def test_greedy_answers_are_those_of_whole_prompts(
    arch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = base(arch)
    # So that what it says depends on what it reads.
    for layer in model.modules():
        if isinstance(layer, (nn.Linear, Conv1D)):
            layer.weight.data *= 10
    prompts = {f"p{i}": row["input_ids"] for i, row in enumerate(rows())}
    module = "secura_serve.evaluate.models.generate"
    monkeypatch.setattr(f"{module}.prompt_ids", lambda _, turns: prompts[turns[0]["content"]])
    widths: list[int] = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    shared = answers(model, _Tokenizer(), list(prompts), max_new_tokens=6)
    assert widths[0] == COMMON
    monkeypatch.setattr(f"{module}.can_share", lambda causal: False)
    assert answers(model, _Tokenizer(), list(prompts), max_new_tokens=6) == shared
    # This GPT-2, whose output layer is its input's, says one token whatever it reads.
    assert len(set(shared)) > 1 or arch == "gpt2"


class _Tokenizer:
    """Numbers in place of words."""

    pad_token_id = 2

    def pad(self, rows: dict[str, list[list[int]]], **_: Any) -> BatchEncoding:
        width = max(map(len, rows["input_ids"]))
        ids = [[2] * (width - len(row)) + row for row in rows["input_ids"]]
        mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows["input_ids"]]
        return BatchEncoding({"input_ids": ids, "attention_mask": mask}, tensor_type="pt")

    def batch_decode(self, rows: torch.Tensor, **_: Any) -> list[str]:
        return [" ".join(map(str, row)) for row in rows.tolist()]
