"""Conversations with N models of an OpenAI-compatible endpoint: stream all answers at once.

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
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import openai

from .answer import Answer, render
from .endpoint import add_arguments, connect, encodable, explain, list_models
from .reader import reader

Message = Mapping[str, str]
LONGEST = 4096
"""How many tokens of an answer the page offers at most."""
LONGEST_TEXT = 500_000
"""How many characters an answer may have: a server may send more than it was asked for."""
SHORTEST_S = 0.05
"""Over less time there is no speed: a server may send many tokens at once."""
LARGEST_SEED = 2**63 - 1


@dataclass(frozen=True)
class Settings:
    """How to sample; the defaults give the same answer every time."""

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = 0

    def within_limits(self) -> Settings:
        """Return the nearest settings that the page offers."""
        # `min` and `max` would let NaN through.
        heat = self.temperature if self.temperature >= 0 else 0.0
        top = self.top_p if 0 < self.top_p <= 1 else 1.0
        seed = self.seed
        if seed is not None:
            seed = min(max(seed, -LARGEST_SEED), LARGEST_SEED)
        return Settings(min(max(self.max_tokens, 1), LONGEST), min(heat, 2.0), top, seed)


@dataclass
class Comparison:
    """Conversations on their way to several models. Iterate for states, `stop()` to end early.

    Each step yields the one list of live answers after at least one of them has changed: a slow
    reader misses steps, never text. Leaving the loop or cancelling it closes every request, upon
    which the server stops generating. Answers are read in a thread of their own, so that their
    times are those of the stream, however long a step takes.

    Args:
        client: of this use alone, since its connections belong to that thread.
        asks: the answer to fill, which names its model, and the messages to send for it.
    """

    client: openai.AsyncOpenAI
    asks: Sequence[tuple[Answer, Sequence[Message]]]
    settings: Settings = Settings()

    def __post_init__(self) -> None:
        self.answers = [answer for answer, _ in self.asks]
        self._changed = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._stopped = False

    def stop(self) -> None:
        """Close the requests that still run; their answers keep the text they have."""
        reader().call(self._cancel)
        for answer in self.answers:
            if not answer.finished:
                answer.state = "stopped"
        self._tell()

    async def __aiter__(self) -> AsyncIterator[list[Answer]]:
        self._loop = asyncio.get_running_loop()
        ended = reader().start(self._ask_all())
        try:
            while not all(answer.finished for answer in self.answers):
                await self._changed.wait()
                self._changed.clear()
                yield self.answers
        finally:
            self.stop()
            await asyncio.wrap_future(ended)

    def _tell(self) -> None:
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._changed.set)

    def _cancel(self) -> None:
        self._stopped = True
        for task in self._tasks:
            task.cancel()

    async def _ask_all(self) -> None:
        if not self._stopped:
            asks = [(answer, said) for answer, said in self.asks if not answer.finished]
            self._tasks = [asyncio.create_task(self._ask(*ask)) for ask in asks]
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _ask(self, answer: Answer, messages: Sequence[Message]) -> None:
        try:
            await self._stream(answer, messages)
            answer.state = "done"
        except asyncio.CancelledError:
            answer.state = "stopped"
            raise
        # Whatever fails here must not take the other answers with it.
        except Exception as error:
            answer.state, answer.error = "failed", explain(error, self.client.base_url)
        finally:
            self._tell()

    async def _open(
        self, model: str, messages: Sequence[Message], **usage: bool
    ) -> openai.AsyncStream[Any]:
        return await self.client.chat.completions.create(
            model=model,
            messages=cast(Any, messages),
            max_tokens=self.settings.max_tokens,
            temperature=self.settings.temperature,
            top_p=self.settings.top_p,
            seed=self.settings.seed,
            stream=True,
            stream_options={"include_usage": True, **usage},  # type: ignore[typeddict-item]
        )

    async def _stream(self, answer: Answer, messages: Sequence[Message]) -> None:
        start = first = last = time.perf_counter()
        tokens_at_first, reason = 0, None
        try:
            stream = await self._open(answer.model, messages, continuous_usage_stats=True)
        except openai.BadRequestError as error:
            # vLLM counts in every chunk; a server that does not know that counts in the last one.
            if "continuous_usage_stats" not in str(error):
                raise
            stream = await self._open(answer.model, messages)
        async with stream:
            async for chunk in stream:
                text = (chunk.choices[0].delta.content or "") if chunk.choices else ""
                answer.text += encodable(text)
                if len(answer.text) > LONGEST_TEXT:
                    raise ValueError(f"it has more than {LONGEST_TEXT} characters")
                counted = chunk.usage.completion_tokens if chunk.usage else None
                # openai lets any type through, and what is no number could be markup.
                known = isinstance(counted, int) and 0 <= counted <= LONGEST_TEXT
                answer.tokens = counted if known else answer.tokens + bool(text)
                if chunk.choices:
                    last, reason = time.perf_counter(), chunk.choices[0].finish_reason or reason
                if answer.tokens and answer.first_token_s is None:
                    # The first chunk may hold several tokens: none of them belongs to the rate.
                    first, tokens_at_first = last, answer.tokens
                    answer.first_token_s, answer.state = last - start, "streaming"
                elif answer.tokens > tokens_at_first and last - first >= SHORTEST_S:
                    answer.tokens_per_s = (answer.tokens - tokens_at_first) / (last - first)
                self._tell()
        # A connection that closes looks like an answer that ends.
        if reason is None:
            raise ConnectionError("the server closed the connection")
        answer.limited = reason == "length"


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
    settings = Settings(args.max_tokens, args.temperature, seed=args.seed)
    async with connect(args.endpoint, args.api_key) as client:
        try:
            served = [] if args.models else [model.id for model in await list_models(client)]
        except openai.OpenAIError as error:
            print(f"compare: {explain(error, args.endpoint)}", file=sys.stderr)
            return 1
    messages = [{"role": "user", "content": args.prompt}]
    if args.system:
        messages.insert(0, {"role": "system", "content": args.system})
    asks = [(Answer(model), messages) for model in args.models or served]
    comparison = Comparison(connect(args.endpoint, args.api_key), asks, settings)
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
