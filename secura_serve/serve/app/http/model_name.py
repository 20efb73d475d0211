"""Which model an HTTP request asks for, read as vLLM's own handlers read it."""

from __future__ import annotations

import json
from typing import Any

from starlette.datastructures import Headers
from starlette.formparsers import MultiPartException
from starlette.requests import Request
from starlette.types import Message, Receive, Scope

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


async def requested_model(route: Route, scope: Scope, body: bytes) -> str | None:
    """Return the model that a request names, or None if it names none, which asks the base.

    A header that vLLM lets override the body (``Route.model_header``) is filled in from the body,
    in ``scope``, where the request does not have it: vLLM would otherwise drop the body's name and
    let the base answer.

    Raises:
        InvalidModelName: it is no string, or header and body name different models.
    """
    name = await _form_field(scope, body) if route.model == "form" else _json_field(body)
    if route.model_header is None:
        return name
    said = Headers(scope=scope).get(route.model_header)
    if said is not None and name is not None and said != name:
        raise InvalidModelName(
            f"the header {route.model_header} names {said[:80]!r} and the body {name[:80]!r}; "
            "name one model"
        )
    if said is None and name is not None:
        header = (route.model_header.encode(), name.encode("latin-1", "replace"))
        scope["headers"] = [*scope["headers"], header]
    return name if said is None else said or None


def _json_field(body: bytes) -> str | None:
    try:
        asked: Any = json.loads(body)
    except (ValueError, RecursionError):
        return None
    name = asked.get("model") if isinstance(asked, dict) else None
    if name is not None and not isinstance(name, str):
        raise InvalidModelName(f"model must be a string, got {type(name).__name__}")
    return name or None


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
