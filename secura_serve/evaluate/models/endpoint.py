"""Models behind an OpenAI-compatible endpoint, asked with many requests at a time."""

from __future__ import annotations

import asyncio
import json
import math
import os
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import openai
from tqdm import tqdm

from secura_serve.errors import ConfigError, EvaluationError
from secura_serve.evaluate.config import EvalConfig
from secura_serve.evaluate.models.base import NEUTRAL_TOKENS, Drift, Likelihood
from secura_serve.evaluate.tasks.registry import suggestion

__all__ = ["Endpoint"]

T = TypeVar("T")
_KL_UNASKED = (
    "not asked for: over an endpoint it takes the logprobs of the whole vocabulary, megabytes a "
    "token. Give --kl-texts N, or measure with --base and --adapter"
)
_KL_REFUSED = (
    "not available over this endpoint, which does not give the logprobs of the whole vocabulary. "
    "Start the server with --max-logprobs -1, or measure with --base and --adapter"
)


class Endpoint:
    """The server at ``config.endpoint``; every model is asked once before any work starts.

    Raises:
        EvaluationError: no server there, or models that cannot be asked, each with the reason.
    """

    def __init__(self, config: EvalConfig) -> None:
        assert config.endpoint is not None
        url = config.endpoint.rstrip("/")
        self.where = url if url.endswith("/v1") else f"{url}/v1"
        self._config = config
        self._key = os.environ.get("OPENAI_API_KEY") or "none"
        listed = asyncio.run(self._listed())
        root = next((m for m in listed if getattr(m, "parent", None) is None), None)
        self._tokenizer = config.tokenizer or getattr(root, "root", None)
        self.base: str | None = root.id if root else None
        wanted = list(config.model) or [
            m.id for m in listed if getattr(m, "status", "ready") in ("ready", "folded")
        ]
        if strangers := [name for name in wanted if name not in {m.id for m in listed}]:
            known = [m.id for m in listed]
            raise EvaluationError(
                f"{self.where} does not serve:",
                [f"{n}: {suggestion(n, known)}" for n in strangers],
                wrong_use=True,
            )
        reason = self._refusal(self.base) if self.base else None
        if reason is not None and self.base not in config.model:
            # Blocked while an adapter is folded: that one can still be scored, on its own.
            self.base = None
        names = [self.base, *wanted] if self.base else wanted
        if self.base is None and not config.model:
            names = [m.id for m in listed if getattr(m, "status", "ready") == "folded"]
        if reason is not None and not names:
            # No fold is the cause, so nothing here answers.
            raise EvaluationError(reason)
        self.names: tuple[str, ...] = tuple(dict.fromkeys(names))
        refused = {name: self._refusal(name) for name in self.names if name != self.base}
        if problems := [f"{name}: {reason}" for name, reason in refused.items() if reason]:
            raise EvaluationError("models that cannot be asked:", problems)

    def _client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(
            base_url=self.where,
            api_key=self._key,
            max_retries=self._config.retries,
            timeout=self._config.timeout,
        )

    async def _listed(self) -> list[Any]:
        async with self._client() as client:
            try:
                return [model async for model in client.models.list()]
            except openai.OpenAIError as error:
                raise self._told(error) from error

    def _refusal(self, model: str) -> str | None:
        """Say why ``model`` does not answer, if so."""
        try:
            self._all([0], lambda client, _: self._complete(client, model, "Hello", max_tokens=1))
        except EvaluationError as error:
            return str(error)
        return None

    def _told(self, error: openai.OpenAIError) -> EvaluationError:
        """Return the client's exception as one line that says what to do."""
        if isinstance(error, openai.APITimeoutError):
            return EvaluationError(
                f"{self.where}: no answer within {self._config.timeout:g} s, asked "
                f"{self._config.retries + 1} times; give --timeout or a smaller --concurrency"
            )
        if isinstance(error, openai.APIConnectionError):
            return EvaluationError(
                f"{self.where}: cannot be reached ({error.__cause__ or error}); is the server "
                "running, and is that its address?"
            )
        if isinstance(error, openai.APIStatusError):
            body = error.body if isinstance(error.body, dict) else {}
            said = body.get("message") or error.message
            return EvaluationError(f"{self.where}: status {error.status_code}: {said}")
        return EvaluationError(f"{self.where}: {error}")

    def _all(
        self,
        items: Sequence[Any],
        ask: Callable[[openai.AsyncOpenAI, Any], Awaitable[T]],
        what: str | None = None,
    ) -> list[T]:
        """Return ``ask`` of every item, in order; the first failure ends them all."""

        async def run() -> list[T]:
            gate = asyncio.Semaphore(self._config.concurrency)
            bar = tqdm(total=len(items), desc=what, disable=None if what else True)

            async def one(client: openai.AsyncOpenAI, item: Any) -> T:
                async with gate:
                    answer = await ask(client, item)
                bar.update()
                return answer

            try:
                async with self._client() as client, asyncio.TaskGroup() as group:
                    tasks = [group.create_task(one(client, item)) for item in items]
            except* openai.OpenAIError as errors:
                raise self._told(_first(errors)) from errors
            finally:
                bar.close()
            return [task.result() for task in tasks]

        try:
            return asyncio.run(run())
        except BaseExceptionGroup as group:
            # What `except*` raises comes wrapped.
            raise _first(group) from None

    async def _complete(
        self, client: openai.AsyncOpenAI, model: str, prompt: Any, **more: Any
    ) -> Any:
        """Return the first choice of a completion, as plain JSON: its logprobs can be megabytes."""
        raw = await client.completions.with_raw_response.create(
            model=model, prompt=prompt, temperature=0, **more
        )
        return json.loads(raw.content)["choices"][0]

    def answers(self, model: str, prompts: Sequence[str], max_new_tokens: int) -> list[str]:
        """Return one greedy answer per prompt.

        Raises:
            EvaluationError: the server failed or was too slow.
        """

        async def ask(client: openai.AsyncOpenAI, prompt: str) -> str:
            if self._config.api == "completions":
                choice = await self._complete(client, model, prompt, max_tokens=max_new_tokens)
                return str(choice["text"]).strip()
            reply = await client.chat.completions.create(
                model=model,
                messages=[{"role": "user", "content": prompt}],
                max_tokens=max_new_tokens,
                temperature=0,
            )
            return (reply.choices[0].message.content or "").strip()

        return self._all(prompts, ask, model)

    def drift(self, model: str, texts: Sequence[str]) -> Drift:
        """Compare ``model`` with the base: perplexities on all texts, KL on the first ``kl_texts``.

        Raises:
            EvaluationError: the server failed, or gives no logprobs of a prompt.
        """
        assert self.base is not None
        rows = [ids for ids in self._all(list(texts), self._ids) if len(ids) > 1]
        before, after = (self._likelihood(name, rows) for name in (self.base, model))
        kl, kl_tokens, missing = self._kl(model, rows[: self._config.kl_texts])
        return Drift(
            perplexity_ratio=math.exp((after.nll - before.nll) / after.tokens),
            base_perplexity=math.exp(before.nll / before.tokens),
            tokens=after.tokens,
            kl=kl,
            kl_tokens=kl_tokens,
            kl_missing=missing,
        )

    async def _ids(self, client: openai.AsyncOpenAI, text: str) -> list[int]:
        """Return token ids by the server's own tokenizer (vLLM's route beside /v1)."""
        reply = await client.post(
            self.where.removesuffix("/v1") + "/tokenize",
            cast_to=object,
            body={"model": self.base, "prompt": text},
        )
        ids: list[int] = reply["tokens"]  # type: ignore[index]
        return ids[:NEUTRAL_TOKENS]

    def _likelihood(self, model: str, rows: list[list[int]]) -> Likelihood:
        async def ask(client: openai.AsyncOpenAI, ids: list[int]) -> float:
            # vLLM's own parameter: per prompt token {token id: {"logprob", ...}}.
            extra = {"prompt_logprobs": 0}
            choice = await self._complete(client, model, ids, max_tokens=1, extra_body=extra)
            places = choice["prompt_logprobs"][1:]
            return -sum(
                float(place[str(token)]["logprob"])
                for token, place in zip(ids[1:], places, strict=True)
            )

        nll = sum(self._all(rows, ask, f"{model}, neutral text"))
        return Likelihood(nll, sum(len(ids) - 1 for ids in rows))

    def _kl(self, model: str, rows: list[list[int]]) -> tuple[float | None, int, str | None]:
        """Return the mean KL in nats with its number of tokens, or why there is none.

        One request for each token and model, so that no more than ``concurrency`` distributions
        are in memory: that of a whole text would be gigabytes of objects.
        """
        if not rows:
            return None, 0, _KL_UNASKED

        async def ask(client: openai.AsyncOpenAI, ids: list[int]) -> float:
            before, after = [await self._next(client, name, ids) for name in (self.base, model)]
            return sum(math.exp(p) * (p - after[token]) for token, p in before.items())

        prefixes = [ids[:length] for ids in rows for length in range(1, len(ids))]
        try:
            divergences = self._all(prefixes, ask, f"{model}, KL")
        except EvaluationError as error:
            if "logprobs" not in str(error):
                raise
            return None, 0, _KL_REFUSED
        return sum(divergences) / len(divergences), len(divergences), None

    async def _next(
        self, client: openai.AsyncOpenAI, model: str | None, ids: list[int]
    ) -> dict[str, float]:
        """Return log p of every token that may follow ``ids``."""
        assert model is not None
        # Ids, because different tokens can read the same.
        extra = {"return_tokens_as_token_ids": True}
        choice = await self._complete(
            client, model, ids, max_tokens=1, logprobs=-1, extra_body=extra
        )
        logprobs: dict[str, float] = choice["logprobs"]["top_logprobs"][0]
        return logprobs

    def harness(self, model: str) -> Any:
        """Return the model for lm-evaluation-harness: its own client of the completions API.

        Raises:
            ConfigError: no tokenizer is at hand.
        """
        from lm_eval.models.openai_completions import LocalCompletionsAPI

        tokenizer = self._tokenizer
        if not tokenizer or (os.sep in tokenizer and not Path(tokenizer).is_dir()):
            raise ConfigError(
                f"the harness needs the base's tokenizer, and {tokenizer or 'the folder'} that the "
                "server names is not on this machine; give --tokenizer NAME or FOLDER"
            )
        return LocalCompletionsAPI(
            base_url=f"{self.where}/completions",
            model=model,
            tokenizer=tokenizer,
            tokenizer_backend="huggingface",
            num_concurrent=self._config.concurrency,
            max_retries=self._config.retries + 1,
            timeout=math.ceil(self._config.timeout),
            header={"Authorization": f"Bearer {self._key}"},
        )


def _first(error: BaseException) -> Any:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
