"""The end of the server as its clients see it: answers finish or say that they do not.

On SIGTERM or Ctrl-C new requests get 503 while running ones finish; what still runs or waits at
the limit (vLLM's ``--shutdown-timeout``), or at a second signal, is cut. When the engine dies,
everything is cut at once. Cut means: 503 for an answer that has not begun, an ``error`` event and
no ``[DONE]`` for an event stream, a broken connection for anything else. The engine is stopped
last, so that nothing is answered by one that is already gone.

Attached through vLLM's ``--middleware``, outermost; knows uvicorn and ASGI.
"""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from secura_serve.serve.app.http.context import context_of
from secura_serve.serve.app.http.errors import error_body, error_response
from secura_serve.serve.app.lifecycle.engine_health import EngineHealth
from secura_serve.serve.logs import say

__all__ = ["MIDDLEWARE", "DrainingMiddleware", "Shutdown"]

MIDDLEWARE = "secura_serve.serve.app.lifecycle.draining.DrainingMiddleware"

_POLL_S = 0.2
# How long an application may take to notice that its client is gone, and a client to take the end.
_NOTICE_S = 2.0
_RETRY_AFTER_S = 10


def _refusal(message: str) -> JSONResponse:
    headers = {"Retry-After": str(_RETRY_AFTER_S), "Connection": "close"}
    return error_response(503, message, headers=headers)


class Shutdown:
    """Decides when the server ends, and ends what runs.

    Args:
        limit: seconds that running requests have once a signal has come.
        health: of the engine.
        admitted: how many requests run, those included that are written in the background.
        leaving: is called when nobody needs any more what is made in the background.
    """

    def __init__(
        self,
        limit: float,
        health: EngineHealth,
        admitted: Callable[[], int] = lambda: 0,
        leaving: Callable[[], None] = lambda: None,
    ) -> None:
        self.limit, self.health, self.admitted = limit, health, admitted
        self._leaving = leaving
        self.engine_died: str | None = None
        """The cause, if the server ends because of it."""
        self.refusal: str | None = None
        """What requests that come now are told; None while the server serves."""
        self.running: set[_Answer] = set()
        self._server: Any = None
        self._hurry = asyncio.Event()
        self._over = False
        self._tasks: list[asyncio.Task[None]] = []

    def begin(self, server: Any, engine: Any) -> None:
        """Take over from vLLM's signal handlers, which would stop the engine first.

        Args:
            server: uvicorn's.
            engine: vLLM's ``EngineClient``.
        """
        self._server = server
        self.health.follow(engine)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self.stop)
        self._tasks.append(loop.create_task(self._watch()))

    def stop(self) -> None:
        """Let running requests finish, then end the server; a second time: end it now."""
        if self.refusal is not None:
            self._hurry.set()
            return
        self.refusal = "the server is stopping"
        waiting = len(self.running)
        if waiting:
            say(
                f"stopping; {waiting} running requests have {self.limit:g} s to "
                "finish (a second signal cuts them)"
            )
        self._tasks.append(asyncio.get_running_loop().create_task(self._drain()))

    def check_engine(self) -> bool:
        """Return whether the engine is dead; the first time that it is, begin the server's end."""
        if self._over or not self.health.dead:
            return False
        if self.engine_died is None and not (self.refusal and self.health.ended_in_order):
            self.engine_died = self.health.cause()
            self.refusal = f"the server is stopping, its engine has died: {self.engine_died}"
            self._hurry.set()
            self._tasks.append(asyncio.get_running_loop().create_task(self._end()))
        return True

    def end(self) -> None:
        """Look at the engine a last time: uvicorn has left, and the engine is stopped next."""
        self.check_engine()
        self._over = True

    async def _watch(self) -> None:
        while not self._over and not self.check_engine():
            await asyncio.sleep(_POLL_S)
        self._hurry.set()

    async def _drain(self) -> None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self.limit
        while (
            (self.running or self.admitted())
            and not self._hurry.is_set()
            and loop.time() < deadline
        ):
            await asyncio.sleep(_POLL_S / 4)
        await self._end()

    async def _end(self) -> None:
        """Cut what runs, then have uvicorn close its connections and leave."""
        assert self.refusal is not None
        self._leaving()
        for answer in tuple(self.running):
            answer.cut(self.refusal)
        deadline = asyncio.get_running_loop().time() + 2 * _NOTICE_S
        while self.running and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(_POLL_S / 4)
        self._server.should_exit = True


class DrainingMiddleware:
    """Every request passes here first; see the module."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        context = context_of(scope["app"])
        shutdown: Shutdown = context.shutdown
        if scope["type"] == "lifespan":
            notice = context.ready_notice
            await self.app(scope, receive, self._beginning(shutdown, scope, send, notice))
        elif shutdown.refusal is None and not shutdown.check_engine():
            if scope["type"] == "http":
                await _Answer(self.app, shutdown, scope, receive, send).give()
            else:
                await self.app(scope, receive, send)
        elif scope["type"] == "http" or "websocket.http.response" in scope.get("extensions", {}):
            await _refusal(str(shutdown.refusal))(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1012})

    def _beginning(self, shutdown: Shutdown, scope: Scope, send: Send, notice: str) -> Send:
        async def noting(message: Message) -> None:
            if message["type"] == "lifespan.startup.complete":
                state = scope["app"].state
                shutdown.begin(state.server, state.engine_client)
                # Here, since vLLM's log has buried what was printed before the engine's start.
                say(f"\n{notice}\n", prefix="")
            elif message["type"].startswith("lifespan.shutdown"):
                # vLLM itself may have noticed first that the engine is dead.
                shutdown.end()
            await send(message)

        return noting


class _Answer:
    """One request on its way through the application, which can be cut."""

    def __init__(
        self, app: ASGIApp, shutdown: Shutdown, scope: Scope, receive: Receive, send: Send
    ) -> None:
        self._app, self._shutdown = app, shutdown
        self._scope, self._receive, self._send = scope, receive, send
        self._started = self._events = self._complete = False
        self._why: str | None = None
        self._gone = asyncio.Event()
        self._task: asyncio.Task[Any] | None = None

    def cut(self, why: str) -> None:
        """End it: the application is told that the client went away, and cancelled if that does
        not reach it."""
        if self._why is not None or self._complete:
            return
        self._why = why
        self._gone.set()
        if self._task is not None:
            asyncio.get_running_loop().call_later(_NOTICE_S / 2, self._cancel)

    def _cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()

    async def give(self) -> None:
        """Run the application; where its answer was cut, tell the client why."""
        self._shutdown.running.add(self)
        self._task = asyncio.current_task()
        try:
            await self._app(self._scope, self._until_cut, self._unless_cut)
        except (asyncio.CancelledError, Exception):
            if self._why is None:
                raise
            if self._task is not None:
                self._task.uncancel()
        finally:
            self._task = None
            try:
                if self._why is not None:
                    await self._say_why(self._why)
            finally:
                self._shutdown.running.discard(self)

    async def _until_cut(self) -> Message:
        """Return the client's next message; once the answer is cut, that the client has gone."""
        message = asyncio.ensure_future(self._receive())
        gone = asyncio.ensure_future(self._gone.wait())
        try:
            await asyncio.wait({message, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            if not message.done():
                message.cancel()
        return {"type": "http.disconnect"} if self._why is not None else message.result()

    async def _unless_cut(self, message: Message) -> None:
        """Pass an answer on, but not what vLLM says about an engine that is dead."""
        if self._why is None and self._bad(message) and self._shutdown.check_engine():
            self.cut(str(self._shutdown.refusal))
        if self._why is not None:
            return
        if message["type"] == "http.response.start":
            self._started = True
            self._events = any(
                name.lower() == b"content-type" and value.startswith(b"text/event-stream")
                for name, value in message.get("headers", ())
            )
        else:
            self._complete = not message.get("more_body", False)
        await self._send(message)

    def _bad(self, message: Message) -> bool:
        """Return whether this may be an error of vLLM's: a status of 500, or part of a stream."""
        if message["type"] == "http.response.start":
            return bool(message["status"] >= 500)
        return self._events

    async def _say_why(self, why: str) -> None:
        # A client that does not read is not waited for.
        with suppress(TimeoutError):
            async with asyncio.timeout(_NOTICE_S / 2):
                if not self._started:
                    await _refusal(why)(self._scope, self._receive, self._send)
                elif self._events:
                    event = f"data: {json.dumps(error_body(503, why))}\n\n".encode()
                    await self._send({"type": "http.response.body", "body": event})
        # An answer of another kind is left incomplete: uvicorn breaks the connection.
