"""Proves that scoring is lenient in the way it says, and that retention is 0 for an untouched
model and equals a plain computation for a changed one.

Needs peft, transformers and the tiny base of conftest.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from secura_serve.evaluate import answers, retention, score, score_json, score_label, score_word
from secura_serve.evaluate.metrics.scoring import score_name, score_number
from secura_serve.train import SecuraConfig, adapter_layers

TEXTS = ["A short line of plain text.", "Another one, which is somewhat longer than the first."]
JSON = '{"name": "Ann", "quantity": 3}'


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("Positive.", True),
        ("The review is positive, not negative.", True),
        ("It is negative", False),
        ("positively so", False),
        ("", False),
    ],
)
def test_label(answer: str, right: bool) -> None:
    assert score_label(answer, "positive") is right


@pytest.mark.parametrize(
    ("answer", "right"),
    [("42", True), ("40 + 2 = 42.", True), ("142", False), ("42-1", False), ("-42", False)],
)
def test_word(answer: str, right: bool) -> None:
    assert score_word(answer, "42") is right


@pytest.mark.parametrize(
    ("answer", "wanted", "right"),
    [
        ("It is Lome, in the south.", "Lomé", True),
        ("SANA\u2019A", "Sana'a", True),
        ("Limassol", "Lima", False),
    ],
)
def test_name(answer: str, wanted: str, right: bool) -> None:
    assert score_name(answer, wanted) is right


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("5 * 4 = 20. The answer is 20.", True),
        ("20", True),
        ("It is $20.00", True),
        ("20 of the 25", False),
        ("1,020", False),
        ("-20", False),
        ("twenty", False),
    ],
)
def test_number(answer: str, right: bool) -> None:
    assert score_number(answer, "4 * 5 = 20. The answer is 20.") is right


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        (JSON, True),
        ('Sure!\n```json\n{"Quantity": "3", "name": " ANN ", "x": 1}\n```', True),
        ('{"order": {"name": "Ann", "quantity": 3}}', True),
        ('{"name": "Ann"} {"quantity": 3}', True),
        ('{"name": "Ann", "quantity": 4}', False),
        ('{"name": "Ann", "quantity": 3', False),
        ("{" * 5000, False),
        ("Ann wants 3", False),
    ],
)
def test_json(answer: str, right: bool) -> None:
    assert score_json(answer, JSON) is right


def test_score_is_a_share() -> None:
    assert score("word", ["1", "x", "3", "4"], ["1", "2", "3", "5"]) == 0.5


def test_retention_and_answers(tiny_base: Callable[[str], Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_base("llama"))
    plain = AutoModelForCausalLM.from_pretrained(tiny_base("llama"), dtype=torch.float32).eval()
    fresh = AutoModelForCausalLM.from_pretrained(tiny_base("llama"), dtype=torch.float32)
    model = get_peft_model(fresh, SecuraConfig(r=8, target_modules="all-linear"))
    untouched = retention(model, tokenizer, TEXTS)
    assert untouched.kl == 0 and untouched.perplexity_ratio == 1
    for layer in adapter_layers(model, "default").values():
        torch.nn.init.normal_(layer.secura_U["default"], std=0.5)
    found = retention(model, tokenizer, TEXTS, max_tokens=8)

    kl, tokens = 0.0, 0
    with torch.no_grad():
        for text in TEXTS:
            ids = torch.tensor([tokenizer(text)["input_ids"][:8]])
            p = plain(ids).logits[0, :-1].log_softmax(-1)
            q = model(ids).logits[0, :-1].log_softmax(-1)
            kl += float((p.exp() * (p - q)).sum())
            tokens += len(p)
    assert found.tokens == tokens and found.kl == pytest.approx(kl / tokens, rel=1e-3)

    # Left padding and batching change no answer.
    alone = [answers(plain, tokenizer, [t], max_new_tokens=4)[0] for t in TEXTS]
    assert answers(plain, tokenizer, TEXTS, max_new_tokens=4) == alone
