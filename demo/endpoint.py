"""Reach an OpenAI-compatible endpoint: its address, its models, its refusals as sentences."""

from __future__ import annotations

import argparse
import asyncio
import os
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import httpx
import openai

from secura_serve.addresses import url_problem

_LONGEST = 1000
LIST_S = 15.0
"""How long a list may take in all: a timeout of its own holds for each piece of an answer."""
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
    to.add_argument(
        "--endpoint",
        default="http://127.0.0.1:8000/v1",
        type=_address,
        metavar="URL",
        help="base URL of the server (default: %(default)s)",
    )
    to.add_argument(
        "--api-key",
        default=os.environ.get("VLLM_API_KEY"),
        metavar="KEY",
        help="key of the server (default: $VLLM_API_KEY)",
    )


def _address(text: str) -> str:
    """Return an endpoint. Raises ArgumentTypeError if nothing can be asked there."""
    if problem := url_problem(text):
        raise argparse.ArgumentTypeError(problem)
    return text


def encodable(text: str) -> str:
    """Return the text with ``?`` for halves of characters, which JSON can hold and UTF-8 cannot."""
    return text.encode("utf-8", "replace").decode()


def without_login(endpoint: str) -> str:
    """Return an address as it may be shown: without user and password."""
    parts = urlsplit(endpoint)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


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
        async with asyncio.timeout(LIST_S):
            page = await client.models.list(timeout=10)
        models = [_model(card) for card in page.data if _answers(card)]
    except TimeoutError as error:
        raise openai.OpenAIError(f"no list of models within {LIST_S:g} s") from error
    # openai trips over an answer that is no list of models, such as some web page.
    except (AttributeError, TypeError, ValueError) as error:
        raise openai.OpenAIError("no list of models; the endpoint should end in /v1") from error
    return sorted(models, key=lambda m: (m.parent is not None, m.id if m.parent else ""))


def _answers(card: Any) -> bool:
    return getattr(card, "status", "ready") in ("ready", "folded")


def _model(card: Any) -> Model:
    """Read an entry. Raises TypeError if its names are none: openai lets any type through."""
    parent = getattr(card, "parent", None)
    if not isinstance(card.id, str) or not isinstance(parent, str | None):
        raise TypeError("a model's name should be a string")
    folded = getattr(card, "status", "") == "folded"
    return Model(encodable(card.id), parent and encodable(parent), folded)


def explain(error: Exception, endpoint: object) -> str:
    """Return the error as a sentence: what went wrong, and what to do about it."""
    endpoint = without_login(str(endpoint)).rstrip("/")
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
    return f"The answer of {endpoint} broke off ({type(error).__name__}): {_told(error)}."


def _told(error: Exception) -> str:
    return encodable(str(error))[:_LONGEST] or "no details"


def explain_response(answer: httpx.Response) -> str:
    """Return the refusal of a request that openai's client does not know."""
    try:
        said = answer.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        said = None
    return _refusal(answer, said, None)


def _refusal(answer: Any, said: object, advice: str | None) -> str:
    said = encodable(str(said or answer.reason_phrase))[:_LONGEST].rstrip(". ")
    parts = "; ".join(filter(None, [said, advice]))
    return f"The server refused ({answer.status_code}): {parts}."
