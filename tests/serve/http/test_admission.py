"""Proves which requests are admitted, which are held, and that none runs while it is closed.

Needs starlette only; requests go through the real ASGI calls.
"""

from __future__ import annotations

import asyncio
import json

import pytest

from secura_serve.serve.app.http import bodies
from secura_serve.serve.app.http.admission import Admission, AdmissionMiddleware, Refusal


class House:
    """An application behind admission that answers with the model's name when told to."""

    def __init__(self, hold_seconds=30.0):
        self.closed_for: set[str] = set()
        self.admission = Admission(
            lambda m: Refusal(409, f"not {m}") if m is None or m in self.closed_for else None,
            hold_seconds=hold_seconds,
        )
        self.background: list[asyncio.Task] = []
        self.app = AdmissionMiddleware(self._answer, self.admission, lambda: self.background)
        self.may_answer, self.leaves = asyncio.Event(), asyncio.Event()
        self.seen: list[str] = []

    async def _answer(self, scope, receive, send):
        body = await receive()
        self.seen.append(body["body"].decode())
        await self.may_answer.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"ok"})

    async def post(self, body: bytes, path: str = "/v1/completions", chunks: int = 1, headers=()):
        size = -(-len(body) // chunks) or 1
        parts = [body[i : i + size] for i in range(0, len(body), size)] or [b""]
        messages = [
            {"type": "http.request", "body": p, "more_body": i + 1 < len(parts)}
            for i, p in enumerate(parts)
        ]
        sent = []

        async def receive():
            if not messages:
                await self.leaves.wait()
                return {"type": "http.disconnect"}
            return messages.pop(0)

        async def send(message):
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": path, "root_path": ""}
        scope["headers"] = [(k.encode(), v.encode()) for k, v in dict(headers).items()]
        self.scope = scope
        await self.app(scope, receive, send)
        if not sent:
            return None, b""
        return sent[0], b"".join(m.get("body", b"") for m in sent[1:])


async def everyone():
    """Let every task run until it waits for something; nothing here takes time."""
    for _ in range(100):
        await asyncio.sleep(0)


def ask(model):
    return json.dumps({"model": model, "prompt": "x"}).encode()


def test_the_body_arrives_whole_and_the_refusal_is_openai_shaped():
    async def run():
        house = House()
        house.may_answer.set()
        start, _ = await house.post(ask("a"), chunks=7)
        assert start["status"] == 200 and house.seen == [ask("a").decode()]
        house.closed_for = {"b"}
        for body, name in (
            (ask("b"), "b"),
            (b"{}", "None"),
            (b"no json", "None"),
            (b"[1]", "None"),
        ):
            start, answer = await house.post(body)
            assert start["status"] == 409
            assert (b"x-should-retry", b"false") in start["headers"]
            error = json.loads(answer)["error"]
            assert error["message"] == f"not {name}" and error["code"] == 409
        assert len(house.seen) == 1 and house.admission.running == 0
        start, _ = await house.post(b"", path="/admin/fold")
        assert start["status"] == 200

    asyncio.run(run())


def test_those_inside_finish_first_and_those_outside_are_judged_afterwards():
    async def run():
        house, events = House(), []
        first = asyncio.create_task(house.post(ask("a")))
        await everyone()
        assert house.admission.running == 1

        async def change():
            async with house.admission.closed(None):
                assert house.admission.running == 0
                events.append("closed")
                await everyone()
                house.closed_for = {"a"}
                events.append("changed")

        assert not house.admission.holding
        changing = asyncio.create_task(change())
        await everyone()
        assert house.admission.holding
        late = [asyncio.create_task(house.post(ask(m))) for m in ("a", "c")]
        await everyone()
        assert events == [] and house.seen == [ask("a").decode()]
        house.may_answer.set()
        await changing
        assert (await first)[0]["status"] == 200 and events == ["closed", "changed"]
        assert [(await task)[0]["status"] for task in late] == [409, 200]
        assert not house.admission.holding

    asyncio.run(run())


def test_a_change_that_waits_too_long_admits_requests_again():
    async def run():
        house = House()
        first = asyncio.create_task(house.post(ask("a")))
        await everyone()
        with pytest.raises(TimeoutError):
            async with house.admission.closed(0.01):
                raise AssertionError("somebody is inside")
        assert not house.admission.holding
        second = asyncio.create_task(house.post(ask("b")))
        await everyone()
        assert house.admission.running == 2
        first.cancel()
        await everyone()
        assert house.admission.running == 1
        house.may_answer.set()
        assert (await second)[0]["status"] == 200 and house.admission.running == 0

    asyncio.run(run())


def test_with_nobody_inside_no_time_is_needed():
    async def run():
        house = House()
        async with house.admission.closed(0.0):
            assert house.admission.holding

    asyncio.run(run())


def test_a_request_that_is_held_too_long_gets_503_and_when_to_try_again():
    async def run():
        house = House(hold_seconds=0.02)
        first = asyncio.create_task(house.post(ask("a")))
        await everyone()
        closing = asyncio.create_task(house.admission.closed(5).__aenter__())
        await everyone()
        start, answer = await house.post(ask("b"))
        assert start["status"] == 503 and (b"retry-after", b"5") in start["headers"]
        assert (b"x-should-retry", b"false") not in start["headers"]
        assert "try again" in json.loads(answer)["error"]["message"]
        house.may_answer.set()
        assert (await first)[0]["status"] == 200
        await closing

    asyncio.run(run())


def test_what_runs_on_after_its_answer_is_waited_for():
    async def run():
        house, events = House(), []
        house.may_answer.set()

        async def later():
            await asyncio.sleep(0.05)
            events.append("written")

        house.background.append(asyncio.create_task(later()))
        assert (await house.post(ask("a"), path="/v1/responses"))[0]["status"] == 200
        # A second request sees the same task, which counts once.
        assert (await house.post(ask("a"), path="/v1/responses"))[0]["status"] == 200
        assert house.admission.running == 1
        async with house.admission.closed(5):
            events.append("closed")
        assert events == ["written", "closed"] and house.admission.running == 0

    asyncio.run(run())


def _form(**fields):
    lines = [
        f'--x\r\nContent-Disposition: form-data; name="{k}"\r\n\r\n{v}\r\n'
        for k, v in fields.items()
    ]
    return "".join([*lines, "--x--\r\n"]).encode()


@pytest.mark.parametrize(
    ("path", "body", "headers", "status", "said"),
    [
        # vLLM drops the body's model on this route and lets the base answer.
        ("/invocations", ask("b"), {}, 409, "not b"),
        ("/invocations", ask("a"), {}, 200, None),
        (
            "/invocations",
            b'{"prompt": "x"}',
            {"x-amzn-sagemaker-adapter-identifier": "b"},
            409,
            "b",
        ),
        ("/invocations", ask("a"), {"x-amzn-sagemaker-adapter-identifier": "b"}, 400, "one model"),
        ("/invocations", b'{"model": 5}', {}, 400, "must be a string"),
        ("/invocations", b'{"prompt": "x"}', {}, 409, "not None"),
        ("/v1/chat/completions", b'{"model": ["b"]}', {}, 400, "must be a string"),
        ("/v1/audio/transcriptions", _form(model="b", file="y"), "form", 409, "not b"),
        ("/v1/audio/transcriptions", _form(model="a"), "form", 200, None),
        ("/v1/audio/transcriptions", b"--x broken", "form", 409, "not None"),
    ],
)
def test_every_way_to_name_a_model_is_judged(path, body, headers, status, said):
    async def run():
        house = House()
        house.may_answer.set()
        house.closed_for = {"b"}
        kind = {"content-type": "multipart/form-data; boundary=x"} if headers == "form" else headers
        start, answer = await house.post(body, path=path, headers=kind)
        assert start["status"] == status
        if said is not None:
            assert said in json.loads(answer)["error"]["message"] and not house.seen
        elif path == "/invocations":
            # What vLLM will read in the body's place.
            assert (b"x-amzn-sagemaker-adapter-identifier", b"a") in house.scope["headers"]

    asyncio.run(run())


def test_a_websocket_whose_model_comes_later_is_refused():
    async def run():
        house, sent = House(), []

        async def send(message):
            sent.append(message)

        scope = {"type": "websocket", "path": "/v1/realtime", "root_path": "", "headers": []}
        await house.app(scope, None, send)
        assert sent[0]["type"] == "websocket.close" and not house.seen

    asyncio.run(run())


def test_a_body_that_is_too_large_is_refused_before_it_is_whole(monkeypatch):
    monkeypatch.setattr(bodies, "LARGEST_REQUEST", 100)

    async def run():
        house = House()
        house.may_answer.set()
        start, answer = await house.post(b"x" * 101, chunks=3)
        assert start["status"] == 413 and "larger than" in json.loads(answer)["error"]["message"]
        assert not house.seen and house.admission.running == 0

    asyncio.run(run())


def test_a_client_that_stops_sending_is_given_up(monkeypatch):
    monkeypatch.setattr(bodies, "STALLED_S", 0.05)
    first = [{"type": "http.request", "body": b"{", "more_body": True}]

    async def receive():
        return first.pop() if first else await asyncio.Future()

    async def run():
        house, sent = House(), []

        async def send(message):
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "root_path": ""}
        await house.app(scope | {"headers": []}, receive, send)
        assert sent[0]["status"] == 408 and b"no more of the body" in sent[1]["body"]
        assert not house.seen and house.admission.running == 0

    asyncio.run(run())


def test_a_client_that_goes_away_waits_no_longer():
    async def run():
        for what in ("an adapter", "a fold"):
            house, ready = House(), asyncio.Event()
            if what == "an adapter":
                house.admission.prepare = lambda model, ready=ready: ready.wait()
            else:
                house.admission._open.clear()
            waiting = asyncio.ensure_future(house.post(ask("a")))
            await everyone()
            assert not waiting.done()
            house.leaves.set()
            assert await asyncio.wait_for(waiting, 5) == (None, b"")
            assert not house.seen and house.admission.running == 0

    asyncio.run(run())


def test_what_is_never_ready_when_its_turn_comes_is_refused():
    async def run():
        house = House(hold_seconds=0.1)
        house.admission.prepare = lambda model: asyncio.sleep(0.01)
        start, answer = await asyncio.wait_for(house.post(ask("a")), 5)
        assert start["status"] == 503 and b"when its turn came" in answer
        assert not house.seen and house.admission.running == 0

    asyncio.run(run())
