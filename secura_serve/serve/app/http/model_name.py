"""Which model an HTTP request asks for, read as vLLM's own handlers read it."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any

from starlette.datastructures import Headers
from starlette.formparsers import MultiPartException
from starlette.requests import Request
from starlette.types import Message, Receive, Scope

from secura_serve.serve.app.http.adapters_field import FIELD, take_adapters
from secura_serve.serve.app.http.routes import Route

__all__ = ["InvalidModelName", "replayed", "requested_model"]


class InvalidModelName(ValueError):
    """A ``model`` that is no string, or a header and a body that name different models."""


def replayed(body: bytes, receive: Receive) -> Receive:
    """Return a ``receive`` that gives ``body`` once and then asks the client again."""
    pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Message:
        return pending.pop() if pending else await receive()

    return again


async def requested_model(
    route: Route, scope: Scope, body: bytes, bases: Collection[str] = ()
) -> tuple[str | None, bytes]:
    """Return the model that a request names, or None if it names none, which asks the base; and the
    body as vLLM is to read it, in which ``model`` stands for the field ``adapters``.

    A header that vLLM lets override the body (``Route.model_header``) is filled in from the body,
    in ``scope``, where the request does not have it: vLLM would otherwise drop the body's name and
    let the base answer.

    Args:
        bases: what the base is called.

    Raises:
        InvalidModelName: it is no string, or header and body name different models.
        MixError: (400) the field ``adapters`` cannot be used.
    """
    if route.model == "form":
        name = await _form_field(scope, body)
    else:
        name, body = _json_field(body, bases)
    if route.model_header is None:
        return name, body
    said = Headers(scope=scope).get(route.model_header)
    if said is not None and name is not None and said != name:
        raise InvalidModelName(
            f"the header {route.model_header} names {said[:80]!r} and the body {name[:80]!r}; "
            "name one model"
        )
    if said is None and name is not None:
        header = (route.model_header.encode(), name.encode("latin-1", "replace"))
        scope["headers"] = [*scope["headers"], header]
    return (name if said is None else said or None), body


def _json_field(body: bytes, bases: Collection[str]) -> tuple[str | None, bytes]:
    try:
        asked: Any = json.loads(body)
    except (ValueError, RecursionError):
        return None, body
    if not isinstance(asked, dict):
        return None, body
    if (name := asked.get("model")) is not None and not isinstance(name, str):
        raise InvalidModelName(f"model must be a string, got {type(name).__name__}")
    if FIELD in asked:
        take_adapters(asked, bases)
        try:
            name, body = asked.get("model"), json.dumps(asked).encode()
        except RecursionError:
            raise InvalidModelName("the body is nested too deeply") from None
    return name or None, body


async def _form_field(scope: Scope, body: bytes) -> str | None:
    async def whole() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    # With "app" in its scope Starlette answers a malformed form itself; vLLM is to do that.
    apart = {key: value for key, value in scope.items() if key != "app"}
    try:
        async with Request(apart, whole).form() as form:
            name = form.get("model")
    except (MultiPartException, ValueError):
        return None
    if name is not None and not isinstance(name, str):
        raise InvalidModelName("model must be a text field of the form, not a file")
    return name or None
