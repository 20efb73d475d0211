"""The door of the endpoint: who may come in depends on what the engine's weights are.

A request is let in for a model name, and is inside until the last byte of its answer is sent. While
the weights change the door is shut: those inside finish first, those outside wait and are judged
by what is folded then. Knows ASGI only, nothing of vLLM.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["Gate", "GateMiddleware", "Refusal"]

_KINDS = {404: "NotFoundError", 409: "ConflictError", 503: "ServiceUnavailableError"}


class Refusal(NamedTuple):
    """Why a request is not answered, as HTTP status and sentence."""

    status: int
    message: str
    param: str = "model"

    def response(self) -> JSONResponse:
        """The error in OpenAI's shape."""
        kind = _KINDS[self.status]
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.status}
        # The openai client would otherwise try a 409 again, twice.
        return JSONResponse({"error": error}, self.status, headers={"x-should-retry": "false"})


class Gate:
    """Counts who is inside.

    Args:
        judge: model name of a request (None if it names none) -> why it may not come in.
    """

    def __init__(self, judge: Callable[[str | None], Refusal | None]) -> None:
        self._judge = judge
        self._open, self._empty = asyncio.Event(), asyncio.Event()
        self._open.set()
        self._empty.set()
        self.inside = 0

    @property
    def holding(self) -> bool:
        """Whether whoever comes now has to wait."""
        return not self._open.is_set()

    @asynccontextmanager
    async def shut(self, timeout: float | None) -> AsyncIterator[None]:
        """Let nobody in, wait until nobody is inside, and open again at the end.

        Raises:
            TimeoutError: somebody was still inside after ``timeout`` seconds; it is open again.
        """
        self._open.clear()
        try:
            # Until 3.12 `wait_for` with no time left gives up even where there is no wait.
            if not self._empty.is_set():
                await asyncio.wait_for(self._empty.wait(), timeout)
            yield
        finally:
            self._open.set()

    @asynccontextmanager
    async def admitted(self, model: str | None) -> AsyncIterator[Refusal | None]:
        """Wait for the door; yields the refusal, or None with the caller inside."""
        await self._open.wait()
        if (refusal := self._judge(model)) is not None:
            yield refusal
            return
        # No await since the door was seen open: whoever shuts it will wait for this one.
        self.inside += 1
        self._empty.clear()
        try:
            yield None
        finally:
            self.inside -= 1
            if not self.inside:
                self._empty.set()


class GateMiddleware:
    """Every POST passes the gate, except those under ``/admin``."""

    def __init__(self, app: ASGIApp, gate: Gate) -> None:
        self.app, self.gate = app, gate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = str(scope.get("path", "")).removeprefix(scope.get("root_path", ""))
        if scope["type"] != "http" or scope["method"] != "POST" or path.startswith("/admin/"):
            await self.app(scope, receive, send)
            return
        body = await _body(receive)
        if body is None:
            return
        pending = [{"type": "http.request", "body": body, "more_body": False}]

        async def again() -> Message:
            return pending.pop() if pending else await receive()

        async with self.gate.admitted(_model(body)) as refusal:
            inner = self.app if refusal is None else refusal.response()
            await inner(scope, again, send)


async def _body(receive: Receive) -> bytes | None:
    """The whole body; None if the client went away."""
    parts = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        if not message.get("more_body"):
            return b"".join(parts)


def _model(body: bytes) -> str | None:
    """The ``model`` that a JSON body names."""
    try:
        asked: Any = json.loads(body)
    except (ValueError, RecursionError):
        return None
    name = asked.get("model") if isinstance(asked, dict) else None
    return name if isinstance(name, str) and name else None
