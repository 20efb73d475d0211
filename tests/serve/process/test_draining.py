"""Proves what a client gets when its answer is cut, that an engine's death is told as what it is,
and that children end with whoever started them.

Needs starlette only; requests go through the real ASGI calls, and processes are real.
"""

from __future__ import annotations

import asyncio
import json
import logging
import multiprocessing
import os
import time
from types import SimpleNamespace

import psutil
import pytest

from secura_serve.serve import children
from secura_serve.serve.app.http.access import Keys
from secura_serve.serve.app.http.context import ServerContext
from secura_serve.serve.app.lifecycle.draining import DrainingMiddleware, Shutdown
from secura_serve.serve.app.lifecycle.engine_health import EngineHealth
from secura_serve.serve.children import ErrorReport


class Engine:
    errored = False


class Uvicorn:
    should_exit = False


class Client:
    """Asks an application that is behind the middleware, and keeps what it is sent."""

    def __init__(self, app, limit=60.0):
        self.engine, self.uvicorn, health = Engine(), Uvicorn(), EngineHealth()
        self.given_up: list[bool] = []
        self.shutdown = Shutdown(limit, health, leaving=lambda: self.given_up.append(True))
        self.app = DrainingMiddleware(app)
        self.state = SimpleNamespace(args=SimpleNamespace())
        ServerContext(None, None, Keys(), shutdown=self.shutdown).hand_over(self.state.args)
        self.shutdown.begin(self.uvicorn, self.engine)
        self.sent: list[dict] = []

    async def ask(self):
        waiting = [{"type": "http.request", "body": b"", "more_body": False}]

        async def receive():
            if not waiting:
                await asyncio.sleep(3600)
            return waiting.pop()

        async def send(message):
            self.sent.append(message)

        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}
        scope["app"] = self
        await self.app(scope, receive, send)

    @property
    def status(self):
        return self.sent[0]["status"]

    @property
    def body(self):
        return b"".join(m.get("body", b"") for m in self.sent[1:])

    @property
    def whole(self):
        return not self.sent[-1].get("more_body", False)


def begin(kind=b"text/event-stream", status=200):
    headers = [(b"content-type", kind)]
    return {"type": "http.response.start", "status": status, "headers": headers}


def part(text, more=True):
    return {"type": "http.response.body", "body": text, "more_body": more}


async def silent(scope, receive, send):
    """Reads its request and answers when told that the client has gone: too late."""
    while (await receive())["type"] != "http.disconnect":
        pass
    await send(begin(b"application/json"))
    await send(part(b"too late", more=False))


async def deaf(scope, receive, send):
    """Notices nothing, like a request that is held until a fold is over."""
    await asyncio.sleep(3600)


async def events(scope, receive, send):
    await send(begin())
    await send(part(b"data: 1\n\n"))
    await silent(scope, receive, send)


async def file(scope, receive, send):
    await send(begin(b"audio/wav"))
    await send(part(b"RIFF"))
    await silent(scope, receive, send)


def test_what_is_written_in_the_background_may_finish_too():
    async def run():
        client, left = Client(silent, limit=30), [1]
        client.shutdown.admitted = lambda: len(left)
        client.shutdown.stop()
        await asyncio.sleep(0.2)
        assert not client.uvicorn.should_exit and not client.given_up
        left.clear()
        await asyncio.sleep(0.2)
        assert client.uvicorn.should_exit and client.given_up

    asyncio.run(run())


@pytest.mark.long
@pytest.mark.parametrize("app", [silent, deaf, events, file])
def test_what_runs_at_the_limit_is_cut_and_shows_it(app):
    async def run():
        client = Client(app, limit=0.2)
        asked = asyncio.create_task(client.ask())
        await asyncio.sleep(0.05)
        client.shutdown.stop()
        await asked
        if app in (silent, deaf):
            assert client.status == 503 and client.whole
            assert b"stopping" in client.body and b"too late" not in client.body
        elif app is events:
            first, second, rest = client.body.decode().split("\n\n")
            assert first == "data: 1" and rest == "" and client.whole
            assert json.loads(second.removeprefix("data: "))["error"]["code"] == 503
        else:
            assert client.body == b"RIFF" and not client.whole
        await asyncio.sleep(0.2)
        assert client.uvicorn.should_exit and not client.shutdown.running
        assert client.shutdown.engine_died is None

    asyncio.run(run())


def test_answers_finish_within_the_limit_and_newcomers_are_refused():
    done = asyncio.Event()

    async def short(scope, receive, send):
        await done.wait()
        await send(begin(b"text/plain"))
        await send(part(b"ok", more=False))

    async def run():
        client = Client(short)
        asked = asyncio.create_task(client.ask())
        await asyncio.sleep(0)
        client.shutdown.stop()
        late, late.sent = client, []
        await late.ask()
        assert late.status == 503 and not client.uvicorn.should_exit
        headers = dict(late.sent[0]["headers"])
        assert headers[b"retry-after"] and headers[b"connection"] == b"close"
        client.sent = []
        done.set()
        await asked
        assert client.status == 200 and client.body == b"ok"
        await asyncio.sleep(0.3)
        assert client.uvicorn.should_exit

    asyncio.run(run())


def test_a_second_signal_cuts_at_once():
    async def run():
        client = Client(silent)
        asked = asyncio.create_task(client.ask())
        await asyncio.sleep(0.05)
        client.shutdown.stop()
        client.shutdown.stop()
        await asyncio.wait_for(asked, 5)
        assert client.status == 503

    asyncio.run(run())


@pytest.mark.parametrize("stream", [False, True])
def test_what_vllm_says_of_a_dead_engine_becomes_a_503(stream):
    async def run():
        async def dying(scope, receive, send):
            await send(begin() if stream else begin(b"application/json", 500))
            if stream:
                await send(part(b"data: 1\n\n"))
            client.engine.errored = True
            for text in (b'data: {"error": {"code": 500}}\n\n', b"data: [DONE]\n\n"):
                await send(part(text))
            await send(part(b"", more=False))

        client = Client(dying)
        if not stream:
            client.engine.errored = True
            client.shutdown.health._engine = Engine()
            asked = asyncio.create_task(client.ask())
            client.shutdown.health._engine = client.engine
            await asked
        else:
            await client.ask()
        assert b"has died" in client.body and b"500" not in client.body
        assert b"[DONE]" not in client.body and b'"code": 503' in client.body.replace(b":5", b": 5")
        assert client.status == (200 if stream else 503)
        await asyncio.sleep(0.5)
        assert client.shutdown.engine_died and client.uvicorn.should_exit

    asyncio.run(run())


def test_the_first_error_of_a_burst_is_the_cause(tmp_path):
    with EngineHealth() as health:
        assert health.reported() is None
        folder = health._folder
        log = logging.getLogger("test.burst")
        log.addHandler(ErrorReport(folder, "EngineCore"))
        try:
            raise FileNotFoundError("adapters/x/adapter.safetensors")
        except FileNotFoundError:
            log.exception("WorkerProc\nfailed.")
        log.error("Executor failed.")
        assert health.cause() == (
            "EngineCore: WorkerProc failed. FileNotFoundError: adapters/x/adapter.safetensors"
        )
        os.utime(folder / str(os.getpid()), (time.time() - 3600,) * 2)
        assert health.reported() is None
    assert not folder.exists()


def _grandchild(ids):
    children.prepare()
    ids.put(os.getpid())
    time.sleep(3600)


def _child(ids):
    children.prepare()
    ids.put(os.getpid())
    multiprocessing.get_context("spawn").Process(target=_grandchild, args=(ids,)).start()
    time.sleep(3600)


def _front(ids):
    """Starts the engine from a thread that ends, which must not look like the parent's end."""
    from threading import Thread

    process = multiprocessing.get_context("spawn").Process(target=_child, args=(ids,))
    thread = Thread(target=process.start)
    thread.start()
    thread.join()
    time.sleep(3600)


@pytest.mark.long
def test_children_and_their_children_end_with_a_killed_parent(tmp_path, monkeypatch):
    monkeypatch.setenv(children.REPORTS, str(tmp_path))
    spawn = multiprocessing.get_context("spawn")
    ids = spawn.Queue()
    front = spawn.Process(target=_front, args=(ids,))
    front.start()
    family = [psutil.Process(ids.get(timeout=60)) for _ in range(2)]
    time.sleep(0.5)
    assert all(process.is_running() for process in family)
    front.kill()
    front.join()
    _, alive = psutil.wait_procs(family, timeout=20)
    assert [p for p in alive if p.status() != psutil.STATUS_ZOMBIE] == []
