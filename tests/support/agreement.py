"""Ask a server many things at once and hold every logprob against the oracle."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path

import torch
from openai import AsyncOpenAI
from transformers import AutoTokenizer

from tests.support import oracle
from tests.support.engines import Served

PROMPTS = (
    "The capital of France is",
    "Once upon a time there was a",
    "def fibonacci(n):",
    "The best film of the year was",
    "2 + 2 =",
    "My name is Anna and I live in",
    "In physics, energy is",
    "How to cook rice:",
    "Water boils at",
    "Dear Sir or Madam,",
)


@dataclass(frozen=True)
class Agreement:
    """One model's answers held against the oracle."""

    worst: float
    """Largest |Δ logprob| over the reported alternatives at every answer position."""
    mean: float
    greedy: int
    """Prompts whose whole greedy answer the oracle would have given too."""
    oracle_mean: float
    """The same mean for the oracle run in the server's own dtype."""
    moved: float
    """|Δ logprob| between the adapted and the plain base, one prompt: 0 would prove nothing."""


async def _ask(served: Served, names: list, prompts: dict[str, list[int]], tokens: int) -> dict:
    client = AsyncOpenAI(base_url=served.url, api_key="none")
    jobs = [(name, text) for text in prompts for name in names]

    async def one(name: str, text: str):
        answer = await client.completions.create(
            model=name,
            prompt=prompts[text],
            max_tokens=tokens,
            temperature=0,
            logprobs=5,
            extra_body={
                "return_token_ids": True,
                "return_tokens_as_token_ids": True,
                "ignore_eos": True,
            },
        )
        return answer.choices[0]

    return dict(zip(jobs, await asyncio.gather(*(one(*job) for job in jobs)), strict=True))


def compare(
    served: Served,
    *names: str,
    tokens: int = 12,
    low: torch.dtype | None = None,
    adapter: Path | None = None,
    mixes: dict[str, dict[str, float]] | None = None,
) -> dict[str, Agreement]:
    """``{model name: Agreement}``: all prompts for all models in one concurrent batch.

    Args:
        names: models to ask; all that answer per request by default.
        low: the server's dtype, where it is not float32.
        adapter: folded into the weights that answer, where the name does not say so.
        mixes: expressions to ask as well, and the adapters and weights that each one means.
    """
    mixes = mixes or {}
    asked = [*(names or served.names()), *mixes]
    tokenizer = AutoTokenizer.from_pretrained(served.base_path)
    prompts = {text: tokenizer(text)["input_ids"] for text in PROMPTS}
    answers = asyncio.run(_ask(served, asked, prompts, tokens))
    plain = oracle.adapted(served.base_path, None)
    found = {}
    for name in asked:
        path = adapter or served.path(name)
        if name in mixes:
            parts = [(served.folder / part, weight) for part, weight in mixes[name].items()]
            exact = oracle.mixed(served.base_path, parts)
        else:
            exact = plain if path is None else oracle.adapted(served.base_path, path)
        rounded = oracle.adapted(served.base_path, path, low) if low else None
        errors, oracle_errors, moved, greedy = [], [], 0.0, 0
        for text, ids in prompts.items():
            choice = answers[name, text]
            tokens_out = list(choice.token_ids)
            want = oracle.logprobs(exact, ids, tokens_out)
            coarse = oracle.logprobs(rounded, ids, tokens_out) if rounded else want
            if moved == 0 and path is not None:
                moved = (want - oracle.logprobs(plain, ids, tokens_out)).abs().max().item()
            greedy += coarse.argmax(-1).tolist() == tokens_out
            for i, alternatives in enumerate(choice.logprobs.top_logprobs):
                for token, value in alternatives.items():
                    j = int(token.removeprefix("token_id:"))
                    errors.append(abs(value - want[i, j].item()))
                    oracle_errors.append(abs(coarse[i, j].item() - want[i, j].item()))
        found[name] = Agreement(
            worst=max(errors),
            mean=sum(errors) / len(errors),
            greedy=greedy,
            oracle_mean=sum(oracle_errors) / len(oracle_errors),
            moved=moved,
        )
    return found
