"""Requests, tokens and time to first token by adapter, counted where the engine is asked.

vLLM counts them for all adapters together.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from typing import Any

from secura_serve.serve.app.adapters.library import split_version
from secura_serve.serve.app.adapters.mixes.grammar import is_expression
from secura_serve.serve.app.metrics import MIXES, Metrics
from secura_serve.serve.compat import first_token_seconds, show_adapters_as, yields_deltas

__all__ = ["count_requests"]


def count_requests(engine: Any, metrics: Metrics, base: Callable[[], str]) -> None:
    """Have everything that is asked of an engine from now on counted.

    A prompt for which several answers are sampled is one request; each beam of a beam search is a
    request of its own.

    Args:
        engine: vLLM's ``EngineClient``.
        base: the name under which requests without an adapter are counted.
    """
    generate, encode = engine.generate, engine.encode

    # vLLM itself counts by name and version.
    show_adapters_as(lambda name: MIXES if is_expression(name) else name)

    def name_of(lora_request: Any) -> str:
        if lora_request is None:
            return base()
        # The engine knows an adapter by name and version.
        name: str = lora_request.lora_name
        return MIXES if is_expression(name) else split_version(name)[0]

    async def counted_generate(
        prompt: Any, sampling_params: Any, *args: Any, lora_request: Any = None, **kwargs: Any
    ) -> AsyncGenerator[Any, None]:
        counts = metrics.of_adapter(name_of(lora_request))
        counts.requests.inc()
        deltas = yields_deltas(sampling_params)
        # Tokens by the number of the answer, where there are several to one prompt.
        tokens: dict[int, int] = {}
        waiting = True
        answers = generate(prompt, sampling_params, *args, lora_request=lora_request, **kwargs)
        try:
            async for answer in answers:
                for part in answer.outputs:
                    before = tokens.get(part.index, 0) if deltas else 0
                    tokens[part.index] = before + len(part.token_ids)
                if waiting:
                    waiting = False
                    counts.prompt_tokens.inc(len(answer.prompt_token_ids or ()))
                    seconds = first_token_seconds(answer)
                    if seconds is not None:
                        counts.time_to_first_token.observe(seconds)
                yield answer
        finally:
            counts.generation_tokens.inc(sum(tokens.values()))
            # vLLM aborts the request when its generator is closed.
            await answers.aclose()

    async def counted_encode(
        prompt: Any,
        pooling_params: Any,
        request_id: str,
        lora_request: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> AsyncGenerator[Any, None]:
        counts = metrics.of_adapter(name_of(lora_request))
        counts.requests.inc()
        waiting = True
        answers = encode(prompt, pooling_params, request_id, lora_request, *args, **kwargs)
        try:
            async for answer in answers:
                if waiting:
                    waiting = False
                    counts.prompt_tokens.inc(len(answer.prompt_token_ids or ()))
                yield answer
        finally:
            await answers.aclose()

    engine.generate, engine.encode = counted_generate, counted_encode
