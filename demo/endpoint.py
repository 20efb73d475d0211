"""Reach an OpenAI-compatible endpoint: its address, its models, its refusals as sentences."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from typing import Any

import httpx
import openai

_LONGEST = 1000
VIA = {"Via": "1.1 secura-demo"}
"""Says to the server that somebody else asks through this machine."""


@dataclass(frozen=True)
class Model:
    """One entry of /v1/models; an adapter names its base as `parent`, a base has none."""

    id: str
    parent: str | None = None
    folded: bool = False
    """The adapter is in the engine's weights, and nothing else answers."""


def add_arguments(to: argparse.ArgumentParser) -> None:
    """Add `--endpoint` and `--api-key`, alike for every command of this folder."""
    to.add_argument("--endpoint", default="http://127.0.0.1:8000/v1", help="base URL (%(default)s)")
    to.add_argument(
        "--api-key", default=os.environ.get("VLLM_API_KEY"), help="(default: $VLLM_API_KEY)"
    )


def connect(endpoint: str, api_key: str | None = None) -> openai.AsyncOpenAI:
    """Return a client that fails at once: openai retries refusals such as 409, and hides them."""
    return openai.AsyncOpenAI(
        base_url=endpoint,
        # openai insists on a key and would otherwise send OPENAI_API_KEY to this endpoint.
        api_key=api_key or "none",
        max_retries=0,
        default_headers=VIA,
        timeout=openai.Timeout(600, connect=5),
    )


async def list_models(client: openai.AsyncOpenAI) -> list[Model]:
    """Return the models that answer now: bases first, then adapters by name.

    secura-serve gives a status: an adapter can be `unfolded`, and all others `blocked` while one is
    `folded`. Raises what `explain` turns into a sentence.
    """
    try:
        page = await client.models.list(timeout=10)
        models = [
            Model(card.id, getattr(card, "parent", None), getattr(card, "status", "") == "folded")
            for card in page.data
            if getattr(card, "status", "ready") in ("ready", "folded")
        ]
    # openai trips over an answer that is no list of models, such as some web page.
    except (AttributeError, TypeError) as error:
        raise openai.OpenAIError("no list of models; the endpoint should end in /v1") from error
    return sorted(models, key=lambda m: (m.parent is not None, m.id if m.parent else ""))


def explain(error: Exception, endpoint: object) -> str:
    """Return the error as a sentence: what went wrong, and what to do about it."""
    endpoint = str(endpoint).rstrip("/")
    if isinstance(error, openai.APITimeoutError):
        return f"The server at {endpoint} did not answer in time: is it overloaded?"
    if isinstance(error, openai.APIConnectionError):
        return f"No server answers at {endpoint}: start it, or check the endpoint's address."
    if isinstance(error, openai.APIStatusError):
        in_v1 = endpoint.endswith("/v1")
        advice = {
            401: "start the page with the server's key (--api-key)",
            404: None if in_v1 else "the endpoint should end in /v1",
        }.get(error.status_code)
        said = error.body.get("message") if isinstance(error.body, dict) else None
        return _refusal(error.response, said, advice)
    return f"The answer of {endpoint} broke off ({type(error).__name__}): {error or 'no details'}."


def explain_response(answer: httpx.Response) -> str:
    """Return the refusal of a request that openai's client does not know."""
    try:
        said = answer.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        said = None
    return _refusal(answer, said, None)


def _refusal(answer: Any, said: object, advice: str | None) -> str:
    said = str(said or answer.reason_phrase)[:_LONGEST].rstrip(". ")
    parts = "; ".join(filter(None, [said, advice]))
    return f"The server refused ({answer.status_code}): {parts}."
