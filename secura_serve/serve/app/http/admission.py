"""Admission to the engine: which requests may run on the weights that are in place now.

A request is admitted for a model name and counts as running until the last byte of its answer is
sent. While the weights change nobody is admitted: those that run finish first, those that come wait
and are judged by what is folded then. Knows ASGI only, nothing of vLLM.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable
from contextlib import (
    AbstractContextManager,
    ExitStack,
    asynccontextmanager,
    nullcontext,
    suppress,
)
from typing import NamedTuple, TypeVar

from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from secura_serve.errors import LifecycleError, MixError
from secura_serve.serve.app.http import bodies
from secura_serve.serve.app.http.adapters_field import FIELD
from secura_serve.serve.app.http.errors import error_response
from secura_serve.serve.app.http.model_name import InvalidModelName, replayed, requested_model
from secura_serve.serve.app.http.routes import WEBSOCKET, Route, find_route, routed_path

__all__ = ["HOLD_SECONDS", "Admission", "AdmissionMiddleware", "Refusal"]

HOLD_SECONDS = 60.0
"""How long a request waits for a change of the weights before it gets a 503."""
_RETRY_AFTER = 5
T = TypeVar("T")


class Refusal(NamedTuple):
    """Why a request is not answered, as HTTP status and sentence."""

    status: int
    message: str
    param: str | None = "model"

    def response(self) -> JSONResponse:
        """Return the error in OpenAI's shape."""
        # The openai client would otherwise try a 409 again, twice.
        headers = {"x-should-retry": "false"}
        if self.status == 503:
            headers = {"retry-after": str(_RETRY_AFTER)}
        return error_response(self.status, self.message, param=self.param, headers=headers)


class Admission:
    """Counts the requests that run, and holds new ones while the weights change.

    Args:
        judge: model name of a request (None if it names none) -> why it may not run.
        hold_seconds: how long a request is held before it is refused.

    ``prepare`` may be set: model name -> what has to be awaited before its request may run (None
    if nothing), and then gives why it may not, or None. ``hold`` may be set: model name -> the
    context in which its request runs once it is prepared; ``hold_all`` that of what goes on after a
    request was answered, whatever it asks for.
    """

    prepare: Callable[[str | None], Awaitable[str | None] | None] = staticmethod(lambda model: None)
    hold: Callable[[str | None], AbstractContextManager[None]] = staticmethod(
        lambda model: nullcontext()
    )
    hold_all: Callable[[], AbstractContextManager[None]] = nullcontext

    def __init__(
        self, judge: Callable[[str | None], Refusal | None], hold_seconds: float = HOLD_SECONDS
    ) -> None:
        self._judge, self._hold_seconds = judge, hold_seconds
        self._open, self._idle = asyncio.Event(), asyncio.Event()
        self._open.set()
        self._idle.set()
        self._later: dict[asyncio.Task[object], ExitStack] = {}
        self._running: set[asyncio.Future[None]] = set()

    @property
    def running(self) -> int:
        """How many requests run."""
        return len(self._running)

    @property
    def holding(self) -> bool:
        """Whether whoever comes now has to wait."""
        return not self._open.is_set()

    @asynccontextmanager
    async def closed(self, timeout: float | None) -> AsyncIterator[None]:
        """Admit nobody, wait until nothing runs, and admit again at the end.

        Raises:
            TimeoutError: something still ran after ``timeout`` seconds; requests are admitted
                again.
        """
        self._open.clear()
        try:
            # Until 3.12 `wait_for` with no time left gives up even where there is no wait.
            if not self._idle.is_set():
                await asyncio.wait_for(self._idle.wait(), timeout)
            yield
        finally:
            self._open.set()

    @asynccontextmanager
    async def admitted(self, model: str | None, receive: Receive) -> AsyncIterator[Refusal | None]:
        """Wait to be admitted; yields the refusal, or None with the request counted as running.

        Args:
            receive: of a request whose body was read; a client that goes away waits no longer.

        Raises:
            ClientDisconnect: it has gone.
        """
        refusal = await self._wait_for_turn(model, receive)
        if refusal is not None:
            yield refusal
            return
        # No await since admission was seen open: whoever closes it will wait for this one.
        mine = self._begin()
        try:
            with self.hold(model):
                yield None
        finally:
            self._end(mine)

    async def _wait_for_turn(self, model: str | None, receive: Receive) -> Refusal | None:
        """Return why a request may not run, or None at a moment when it may."""
        clock = asyncio.get_running_loop().time
        deadline = clock() + self._hold_seconds
        while True:
            if self.holding and not await _while_connected(receive, self._opened()):
                return Refusal(
                    503,
                    "an adapter is being folded into the weights or taken out of them, and has "
                    f"held this request for {self._hold_seconds:g} s: try again",
                    None,
                )
            if (refusal := self._judge(model)) is not None:
                return refusal
            if (work := self.prepare(model)) is None:
                return None
            if clock() > deadline:
                if asyncio.iscoroutine(work):
                    work.close()
                return Refusal(
                    503,
                    f"{model} was made ready, but was not any more when its turn came, for "
                    f"{self._hold_seconds:g} s: try again",
                )
            # The weights, and what the name stands for, may be others afterwards.
            try:
                why = await _while_connected(receive, work)
            except ClientDisconnect:
                raise
            except Exception as error:
                return Refusal(503, f"{model} cannot be prepared now ({error}): try again")
            if why is not None:
                return Refusal(409, f"{model} cannot be served: {why}")

    async def ended(self) -> None:
        """Return once every request that runs now has ended."""
        if self._running:
            await asyncio.wait(set(self._running))

    async def _opened(self) -> bool:
        """Wait until requests are admitted; False once one has been held for too long."""
        clock = asyncio.get_running_loop().time
        deadline = clock() + self._hold_seconds
        # It may be closed again before a waiter's turn comes.
        while not self._open.is_set():
            try:
                await asyncio.wait_for(self._open.wait(), max(0.0, deadline - clock()))
            except TimeoutError:
                return False
        return True

    def count(self, tasks: Iterable[asyncio.Task[object]]) -> None:
        """Count what goes on after its request was answered, until each task is done."""
        for task in tasks:
            if task not in self._later and not task.done():
                held = self._later[task] = ExitStack()
                held.callback(self._end, self._begin())
                held.enter_context(self.hold_all())
                task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[object]) -> None:
        self._later.pop(task).close()

    def _begin(self) -> asyncio.Future[None]:
        """Count a request as running; the future is what ends it."""
        mine: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._running.add(mine)
        self._idle.clear()
        return mine

    def _end(self, mine: asyncio.Future[None]) -> None:
        self._running.discard(mine)
        mine.set_result(None)
        if not self._running:
            self._idle.set()


async def _while_connected(receive: Receive, work: Awaitable[T]) -> T:
    """Await something for a client that waits.

    In the task of the caller: what it is ready for must not become untrue before it goes on.

    Raises:
        ClientDisconnect: it went away meanwhile.
    """
    limit, clock = asyncio.timeout(None), asyncio.get_running_loop().time

    async def watch_client() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        limit.reschedule(clock())

    try:
        async with limit:
            watch = asyncio.ensure_future(watch_client())
            try:
                return await work
            finally:
                watch.cancel()
    except TimeoutError:
        if limit.expired():
            raise ClientDisconnect from None
        raise


class AdmissionMiddleware:
    """Passes every request on a route that names a model through :class:`Admission`.

    Args:
        background: the tasks that vLLM has started for requests it answered already
            (``/v1/responses`` with ``"background": true``).
        bases: what the base is called.
    """

    def __init__(
        self,
        app: ASGIApp,
        admission: Admission,
        background: Callable[[], Iterable[asyncio.Task[object]]] = tuple,
        bases: Collection[str] = (),
    ) -> None:
        self.app, self.admission, self.background = app, admission, background
        self.bases = bases

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        route = None
        if scope["type"] in ("http", "websocket"):
            method = WEBSOCKET if scope["type"] == "websocket" else scope["method"]
            route = find_route(routed_path(scope), method)
        if route is None or route.model is None:
            await self.app(scope, receive, send)
        elif route.model == "websocket":
            # Its model comes in a message, after the connection is accepted.
            await send({"type": "websocket.close", "code": 1008, "reason": "not served here"})
        else:
            await self._admit(route, scope, receive, send)

    async def _admit(self, route: Route, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            body = await bodies.read_body(receive, bodies.LARGEST_REQUEST)
        except LifecycleError as error:
            await Refusal(error.status, str(error)).response()(scope, receive, send)
            return
        if body is None:
            return
        try:
            model, body = await requested_model(route, scope, body, self.bases)
        except InvalidModelName as error:
            await Refusal(400, str(error)).response()(scope, receive, send)
            return
        except MixError as error:
            await Refusal(error.status, str(error), FIELD).response()(scope, receive, send)
            return
        again = replayed(body, receive)
        with suppress(ClientDisconnect):
            async with self.admission.admitted(model, receive) as refusal:
                if refusal is not None:
                    await refusal.response()(scope, again, send)
                    return
                try:
                    await self.app(scope, again, send)
                finally:
                    self.admission.count(self.background())
