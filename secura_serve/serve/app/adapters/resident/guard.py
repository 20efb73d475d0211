"""The last guard in front of the engine, which would end if it were asked for an empty place."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

from secura_serve.serve.app.adapters.resident.slots import ResidentSlots

__all__ = ["guard"]


def guard(engine: Any, places: ResidentSlots) -> None:
    """Have every request hold the place that it needs, and refuse one whose place is not filled.

    Args:
        engine: vLLM's ``EngineClient``; ``generate`` and ``encode`` are wrapped.
    """
    generate, encode = engine.generate, engine.encode

    def held(ask: Any) -> Any:
        async def guarded(*args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
            request = kwargs.get("lora_request")
            if request is None and ask is encode and len(args) > 3:
                request = args[3]
            with places.hold(request):
                answers = ask(*args, **kwargs)
                try:
                    async for answer in answers:
                        yield answer
                finally:
                    # vLLM aborts the request when its generator is closed.
                    await answers.aclose()

        return guarded

    engine.generate, engine.encode = held(generate), held(encode)
