"""Proves the start that the README shows: bfloat16, compiled, chat page on, no further flags.

Needs vLLM on a CPU, a C++ compiler (vLLM compiles the model) and the embedded base. The oracle is
transformers on weights folded in float64; "bfloat16 noise" is what transformers' own bfloat16 run
differs from it.
"""

from __future__ import annotations

import asyncio
import json
import time
import urllib.request
from functools import cache

import pytest
import torch
from openai import AsyncOpenAI, OpenAI
from transformers import AutoTokenizer

from secura_serve.bases import cache_root
from tests.support import ROOT, oracle
from tests.support.engines import free_port, serving

TOKENS = 12
_DATES = (
    "3 March 1987", "the 21st of June 2024", "October 5, 1999",
    "12 Sep. 2018", "the 2nd of February 2040", "Friday, August 13, 2032",
)  # fmt: skip
_REVIEWS = (
    "a charming and tender film with two wonderful leads",
    "an endless, joyless mess that wastes a fine cast",
    "it is hard to remember a duller evening at the cinema",
    "one of the most moving portraits of old age in years",
    "clumsy dialogue and lifeless acting sink this thriller",
    "smart, warm and surprising: a small masterpiece",
)
_ORDERS = (
    "Hello, I am Laura and need 12 lamps in Madrid.",
    "Please send 30 chairs to Oslo. Ask for Peter.",
    "This is Karim from Cairo, we would like 8 tables.",
    "Nina here. 40 blankets for Helsinki, please.",
    "Good morning, Yuki speaking, 18 kettles to Osaka please.",
    "We are short of 9 tents in Athens. Thank you, Eleni.",
)
_QUESTIONS = (
    "What is the capital of France?", "Name a colour.", "Who wrote Hamlet?",
    "Is the sun hot?", "How many days has a week?", "What do cows drink?",
)  # fmt: skip
PROMPTS = {
    "smollm2-135m": _QUESTIONS,
    "sentiment": [f"Is this film review positive or negative?\n\n{text}" for text in _REVIEWS],
    "iso-date": [f"Write this date in the format YYYY-MM-DD: {text}" for text in _DATES],
    "extract": [f"Extract name, item, quantity and city as JSON: {text}" for text in _ORDERS],
}


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    log, page = tmp_path_factory.mktemp("default") / "log", free_port()
    flags = ("--ui-port", str(page))
    with serving(
        "smollm2-135m", ROOT / "adapters", log, *flags, chat_page=True, cold=True
    ) as server:
        yield server, page


def _hold_against_transformers(served, prompts):
    """All prompts in one concurrent batch; five of six greedy answers equal, noise no larger."""
    tokenizer = AutoTokenizer.from_pretrained(served.base_path)

    @cache
    def encode(text):
        chat = [{"role": "user", "content": text}]
        return tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)

    async def ask():
        client = AsyncOpenAI(base_url=served.url, api_key="none")
        jobs = [(name, text) for name, texts in prompts.items() for text in texts]
        calls = [
            client.completions.create(
                model=name,
                prompt=encode(text),
                max_tokens=TOKENS,
                temperature=0,
                logprobs=1,
                extra_body={"return_token_ids": True},
            )
            for name, text in jobs
        ]
        return dict(zip(jobs, await asyncio.gather(*calls), strict=True))

    answers = asyncio.run(ask())
    for name, texts in prompts.items():
        choices = [answers[name, text].choices[0] for text in texts]
        asked = [(encode(text), list(c.token_ids)) for text, c in zip(texts, choices, strict=True)]
        model = oracle.adapted(served.base_path, served.path(name))
        exact = [oracle.logprobs(model, *one) for one in asked]
        model.to(torch.bfloat16)
        coarse = [oracle.logprobs(model, *one) for one in asked]
        equal, served_error, noise = 0, [], []
        for (_, tokens), choice, want, rough in zip(asked, choices, exact, coarse, strict=True):
            equal += tokens in (want.argmax(-1).tolist(), rough.argmax(-1).tolist())
            for i, token in enumerate(tokens):
                served_error.append(abs(choice.logprobs.token_logprobs[i] - want[i, token].item()))
                noise.append(abs(rough[i, token].item() - want[i, token].item()))
        mean, allowed = sum(served_error) / len(served_error), sum(noise) / len(noise)
        assert equal >= len(texts) - 1, (name, equal)
        # Where a model is nearly certain both errors are a few thousandths, and either may be less.
        assert mean <= max(1.5 * allowed, 0.005), (name, mean, allowed)


def test_greedy_text_and_logprobs_in_one_mixed_batch(started):
    served, _ = started
    assert set(served.names()) >= set(PROMPTS)
    _hold_against_transformers(served, PROMPTS)


def test_the_compiled_model_is_kept_for_the_next_start(started):
    served, _ = started
    assert "load failure" not in served.log.read_text()
    # The generated C++, which Inductor looks for before it compiles.
    assert any((cache_root() / "inductor").rglob("*.so"))


def test_an_adapter_folded_into_the_compiled_model_and_taken_out_again(started):
    served, _ = started
    client = OpenAI(base_url=served.url, api_key="none", max_retries=0)
    prompt = "The quick brown fox jumps over the lazy dog. " * 12

    def ask(model):
        answer = client.completions.create(
            model=model, prompt=prompt, max_tokens=8, temperature=0, logprobs=5
        )
        return answer.choices[0].logprobs.top_logprobs

    def post(path, **body):
        request = urllib.request.Request(
            served.url.replace("/v1", path),
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            assert answer.status == 200

    before = {name: ask(name) for name in ("smollm2-135m", "iso-date")}
    post("/admin/fold", name="iso-date-bounded")
    _hold_against_transformers(served, {"iso-date-bounded": PROMPTS["iso-date"]})
    post("/admin/unfold")
    assert {name: ask(name) for name in before} == before


def test_chat_page_is_announced_and_answers(started):
    served, page = started
    address = f"http://127.0.0.1:{page}"
    deadline = time.monotonic() + 180
    while f"chat page: {address}" not in served.log.read_text():
        assert time.monotonic() < deadline, served.log.read_text()[-3000:]
        time.sleep(0.5)
    with urllib.request.urlopen(address, timeout=30) as answer:
        assert answer.status == 200
