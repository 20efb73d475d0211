"""Proves who the gate lets in, whom it holds, and that nobody is inside while it is shut.

Needs starlette only; requests go through the real ASGI calls.
"""

from __future__ import annotations

import asyncio
import json

import pytest

from secura_serve.serve.gate import Gate, GateMiddleware, Refusal


class House:
    """A gated application that answers with the model's name when told to."""

    def __init__(self):
        self.closed_for: set[str] = set()
        self.gate = Gate(
            lambda m: Refusal(409, f"not {m}") if m is None or m in self.closed_for else None
        )
        self.app = GateMiddleware(self._answer, self.gate)
        self.may_answer = asyncio.Event()
        self.seen: list[str] = []

    async def _answer(self, scope, receive, send):
        body = await receive()
        self.seen.append(body["body"].decode())
        await self.may_answer.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"ok"})

    async def post(self, body: bytes, path: str = "/v1/completions", chunks: int = 1):
        size = -(-len(body) // chunks) or 1
        parts = [body[i : i + size] for i in range(0, len(body), size)] or [b""]
        messages = [
            {"type": "http.request", "body": p, "more_body": i + 1 < len(parts)}
            for i, p in enumerate(parts)
        ]
        sent = []

        async def receive():
            return messages.pop(0)

        async def send(message):
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": path, "root_path": "", "headers": []}
        await self.app(scope, receive, send)
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
        assert len(house.seen) == 1 and house.gate.inside == 0
        start, _ = await house.post(b"", path="/admin/fold")
        assert start["status"] == 200

    asyncio.run(run())


def test_those_inside_finish_first_and_those_outside_are_judged_afterwards():
    async def run():
        house, events = House(), []
        first = asyncio.create_task(house.post(ask("a")))
        await everyone()
        assert house.gate.inside == 1

        async def change():
            async with house.gate.shut(None):
                assert house.gate.inside == 0
                events.append("shut")
                await everyone()
                house.closed_for = {"a"}
                events.append("changed")

        assert not house.gate.holding
        changing = asyncio.create_task(change())
        await everyone()
        assert house.gate.holding
        late = [asyncio.create_task(house.post(ask(m))) for m in ("a", "c")]
        await everyone()
        assert events == [] and house.seen == [ask("a").decode()]
        house.may_answer.set()
        await changing
        assert (await first)[0]["status"] == 200 and events == ["shut", "changed"]
        assert [(await task)[0]["status"] for task in late] == [409, 200]
        assert not house.gate.holding

    asyncio.run(run())


def test_a_change_that_waits_too_long_opens_the_gate_again():
    async def run():
        house = House()
        first = asyncio.create_task(house.post(ask("a")))
        await everyone()
        with pytest.raises(TimeoutError):
            async with house.gate.shut(0.01):
                raise AssertionError("somebody is inside")
        assert not house.gate.holding
        second = asyncio.create_task(house.post(ask("b")))
        await everyone()
        assert house.gate.inside == 2
        first.cancel()
        await everyone()
        assert house.gate.inside == 1
        house.may_answer.set()
        assert (await second)[0]["status"] == 200 and house.gate.inside == 0

    asyncio.run(run())


def test_with_nobody_inside_no_time_is_needed():
    async def run():
        house = House()
        async with house.gate.shut(0.0):
            assert house.gate.holding

    asyncio.run(run())
