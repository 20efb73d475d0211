"""One prompt, N models of an OpenAI-compatible endpoint: stream all answers at once.

Knows HTTP and nothing else, so it works with any server that has /v1/models and streaming chat
completions. `app.py` draws what this yields; the command line prints it:

    python -m demo.compare --endpoint http://127.0.0.1:8000/v1 --models smollm2-135m,sql "prompt"
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import sys
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import openai

from .answer import Answer, render
from .endpoint import add_arguments, connect, explain, list_models


@dataclass(frozen=True)
class Settings:
    """How to sample; the defaults give the same answer every time."""

    max_tokens: int = 256
    temperature: float = 0.0
    seed: int | None = 0


@dataclass
class Comparison:
    """A prompt on its way to several models. Iterate for states, `stop()` to end early.

    Each step yields the one list of live answers after at least one of them has changed: a slow
    reader misses steps, never text. Leaving the loop or cancelling it closes every request, upon
    which the server stops generating.
    """

    client: openai.AsyncOpenAI
    models: Sequence[str]
    prompt: str
    system: str = ""
    settings: Settings = Settings()
    answers: list[Answer] = field(init=False)

    def __post_init__(self) -> None:
        self.answers = [Answer(model) for model in self.models]
        self._changed = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    def stop(self) -> None:
        """Close the requests that still run; their answers keep the text they have."""
        for task in self._tasks:
            task.cancel()
        for answer in self.answers:
            if not answer.finished:
                answer.state = "stopped"
        self._changed.set()

    async def __aiter__(self) -> AsyncIterator[list[Answer]]:
        asked = [answer for answer in self.answers if not answer.finished]
        self._tasks = [asyncio.create_task(self._ask(answer)) for answer in asked]
        try:
            while not all(answer.finished for answer in self.answers):
                await self._changed.wait()
                self._changed.clear()
                yield self.answers
        finally:
            self.stop()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _ask(self, answer: Answer) -> None:
        try:
            await self._stream(answer)
            answer.state = "done"
        # Whatever fails here must not take the other answers with it.
        except Exception as error:
            answer.state, answer.error = "failed", explain(error, self.client.base_url)
        self._changed.set()

    async def _open(self, model: str, **usage: bool) -> openai.AsyncStream[Any]:
        messages: list[Any] = [{"role": "system", "content": self.system}] if self.system else []
        return await self.client.chat.completions.create(
            model=model,
            messages=[*messages, {"role": "user", "content": self.prompt}],
            max_tokens=self.settings.max_tokens,
            temperature=self.settings.temperature,
            seed=self.settings.seed,
            stream=True,
            stream_options={"include_usage": True, **usage},  # type: ignore[typeddict-item]
        )

    async def _stream(self, answer: Answer) -> None:
        start = first = last = time.perf_counter()
        tokens_at_first = 0
        try:
            stream = await self._open(answer.model, continuous_usage_stats=True)
        except openai.BadRequestError as error:
            # vLLM counts in every chunk; a server that does not know that counts in the last one.
            if "continuous_usage_stats" not in str(error):
                raise
            stream = await self._open(answer.model)
        async with stream:
            async for chunk in stream:
                text = (chunk.choices[0].delta.content or "") if chunk.choices else ""
                answer.text += text
                counted = chunk.usage.completion_tokens if chunk.usage else None
                answer.tokens = answer.tokens + bool(text) if counted is None else counted
                if chunk.choices:
                    last = time.perf_counter()
                if answer.tokens and answer.first_token_s is None:
                    # The first chunk may hold several tokens: none of them belongs to the rate.
                    first, tokens_at_first = last, answer.tokens
                    answer.first_token_s, answer.state = last - start, "streaming"
                elif answer.tokens > tokens_at_first and last > first:
                    answer.tokens_per_s = (answer.tokens - tokens_at_first) / (last - first)
                self._changed.set()


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="compare",
        description="Ask several models of one endpoint the same and print the answers.",
    )
    made.add_argument("prompt")
    made.add_argument(
        "--models", type=lambda names: names.split(","), help="separated by commas (default: all)"
    )
    made.add_argument("--system", default="", help="system prompt")
    made.add_argument("--max-tokens", type=int, default=256, help="per answer (%(default)s)")
    made.add_argument("--temperature", type=float, default=0.0, help="(%(default)s)")
    made.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    add_arguments(made)
    return made


async def run(args: argparse.Namespace) -> int:
    """Print all answers and return the exit status: 1 if one of them failed."""
    settings = Settings(args.max_tokens, args.temperature, args.seed)
    async with connect(args.endpoint, args.api_key) as client:
        try:
            served = [] if args.models else [model.id for model in await list_models(client)]
        except openai.OpenAIError as error:
            print(f"compare: {explain(error, args.endpoint)}", file=sys.stderr)
            return 1
        comparison = Comparison(client, args.models or served, args.prompt, args.system, settings)
        async for answers in comparison:
            if sys.stderr.isatty():
                total = sum(answer.tokens for answer in answers)
                print(f"\r{total} tokens", end="\r", file=sys.stderr, flush=True)
    print(render(comparison.answers, shutil.get_terminal_size().columns))
    return int(any(answer.error for answer in comparison.answers))


if __name__ == "__main__":
    try:
        sys.exit(asyncio.run(run(parser().parse_args())))
    except KeyboardInterrupt:
        sys.exit(130)
