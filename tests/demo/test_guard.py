"""Proves which requests the page's process answers: those of its own page, and only so much.

Needs openai; the app behind the guard and the server are scripted ones.
"""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("openai")
from demo import guard as guards
from demo.guard import Guard, is_local
from demo.server import Snapshot
from tests.demo.test_server import run

OTHER_SITE = {"sec-fetch-site": "cross-site"}


def guarded(*, local_only: bool = True, operator: Any = "key") -> Guard:
    class Known:
        async def snapshot(self) -> Snapshot:
            return Snapshot(operator=operator)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})

    known: Any = Known()
    return Guard(app, known, local_only)


def ask(guard: Guard, path: str, method: str = "GET", body: bytes = b"", **headers: str) -> int:
    """Return the status of an answer."""
    given = {"host": "localhost:7860"} | {k.replace("_", "-"): v for k, v in headers.items()}
    raw = [(key.encode(), value.encode()) for key, value in given.items()]
    scope = {"type": "http", "method": method, "path": path, "headers": raw}
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": body}

    async def send(message: Any) -> None:
        sent.append(message)

    async def once() -> None:
        await guard(scope, receive, send)

    run(once())
    return int(sent[0]["status"])


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:7860", "127.0.0.1", "127.8.8.8:1", "[::1]:7860"]
)
def test_names_of_this_machine(host: str) -> None:
    assert is_local(host) and ask(guarded(), "/", host=host) == 200


@pytest.mark.parametrize("host", ["", "evil.test", "localhost.evil.test", "127.0.0.1.evil.test:80"])
def test_a_page_without_login_has_no_other_name(host: str) -> None:
    assert ask(guarded(), "/config", host=host) == 421
    assert ask(guarded(local_only=False), "/config", host=host) == 200


def test_another_site_may_link_to_the_page_and_no_more() -> None:
    join = "/gradio_api/queue/join"
    assert ask(guarded(), "/", **OTHER_SITE) == 200
    assert ask(guarded(), "/gradio_api/queue/data", **OTHER_SITE) == 403
    for path in (join, "/gradio_api/upload", "/login"):
        assert ask(guarded(), path, "POST", content_length="2", **OTHER_SITE) == 403
        assert ask(guarded(), path, "POST", content_length="2", sec_fetch_site="same-site") == 403
        assert ask(guarded(), path, "POST", content_length="2", sec_fetch_site="same-origin") == 200
    assert ask(guarded(), join, "POST", content_length=str(2**23)) == 413
    assert ask(guarded(), join, "POST", transfer_encoding="chunked") == 411


def test_no_link_holds_what_a_visitor_typed() -> None:
    assert ask(guarded(), "/gradio_api/deep_link", query="session_hash=x") == 404


def test_uploads_are_for_the_operator_and_do_not_fill_the_disk(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    upload = "/gradio_api/upload"
    assert ask(guarded(operator="nobody"), upload, "POST", content_length="9") == 403
    assert ask(guarded(), f"{upload}_progress") == ask(guarded(), upload, "POST") == 200
    monkeypatch.setattr(guards, "LARGEST_UPLOADS", 100)
    guard = guarded()
    assert ask(guard, upload, "POST", content_length="101") == 413
    assert ask(guard, upload, "POST", transfer_encoding="chunked") == 411
    # What was announced and did not come is not counted.
    assert ask(guard, upload, "POST", b"", content_length="90") == 200
    assert ask(guard, upload, "POST", b"x" * 60, content_length="60") == 200
    assert ask(guard, upload, "POST", b"x" * 60, content_length="60") == 413
    guard._uploads[-1][0] -= guards.KEPT_S + 1
    guard._uploads[0][0] -= guards.KEPT_S + 1
    assert ask(guard, upload, "POST", b"x" * 60, content_length="60") == 200
