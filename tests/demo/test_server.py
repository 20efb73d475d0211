"""Proves what the page asks of a server, and that it changes nothing where nobody has a key.

Needs openai and prometheus_client; the server is a scripted one. One test holds the header that
says "somebody else asks" against the real server's rule.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("openai")
pytest.importorskip("prometheus_client")
from demo.endpoint import VIA, connect
from demo.live.samples import History, read
from demo.server import Refused, Server
from tests.support.fake_server import BASE, FakeServer


def run(work: Any) -> Any:
    """Run a coroutine; in a thread of its own, since Playwright's loop may run in this one."""
    with ThreadPoolExecutor(1) as other:
        return other.submit(asyncio.run, work).result()


def test_a_snapshot_has_models_cards_and_who_may_change():
    with FakeServer(admin_key="secret") as fake:
        now = run(Server(connect(fake.url)).snapshot())
    assert now.problem is None and now.bases == [BASE] and now.served == ["iso-date", "sentiment"]
    assert now.operator == "key" and now.card("sentiment")["rank"] == 32
    with FakeServer() as fake:
        assert run(Server(connect(fake.url)).snapshot()).operator == "nobody"
    with FakeServer(plain=True) as fake:
        now = run(Server(connect(fake.url)).snapshot())
        assert now.served and not now.adapters and now.operator == "nobody"
    now = run(Server(connect(fake.url)).snapshot())
    assert "No server answers at" in now.problem
    with FakeServer(api_key="k") as fake:
        assert "(401)" in run(Server(connect(fake.url)).snapshot()).problem
        assert run(Server(connect(fake.url, "k")).snapshot()).problem is None


def test_changes_need_the_servers_own_key(tmp_path: Path):
    file = tmp_path / "adapter_config.json"
    file.write_text("{}")

    async def all_of(server: Server, key: str) -> list[str]:
        return [
            await server.pin(key, "sentiment", True),
            await server.rollback(key, "sentiment", "a1b2c3"),
            await server.fold(key, "sentiment"),
            await server.fold(key, None),
            await server.upload(key, "new", [file]),
            await server.delete(key, "sentiment"),
        ]

    with FakeServer(admin_key="secret") as fake:
        assert len(run(all_of(Server(connect(fake.url)), "secret"))) == 6
        paths = [(method, path) for method, path, _ in fake.changes]
        assert paths == [
            ("POST", "/v1/adapters/sentiment/pin"),
            ("POST", "/v1/adapters/sentiment/rollback"),
            ("POST", "/admin/fold"),
            ("POST", "/admin/unfold"),
            ("PUT", "/v1/adapters/new"),
            ("DELETE", "/v1/adapters/sentiment"),
        ]
        for key, said in (
            ("wrong", r"\(401\)"),
            ("", "Enter"),
            ("a\nb", "no key"),
            ("ä", "no key"),
        ):
            with pytest.raises(Refused, match=said):
                run(all_of(Server(connect(fake.url)), key))
    with FakeServer() as fake:
        for key in ("anything", "none"):
            with pytest.raises(Refused, match=r"\(403\)"):
                run(all_of(Server(connect(fake.url)), key))
        assert fake.changes == []
    with pytest.raises(Refused, match="No answer"):
        run(all_of(Server(connect(fake.url)), "secret"))


def test_changes_of_the_weights_are_numbers_or_a_sentence():
    with FakeServer() as fake:
        server = Server(connect(fake.url))
        assert run(server.changes("sentiment")) == fake.moved
        for moved, name, said in (
            ({}, "sentiment", "told no changes of sentiment"),
            ({"q": "x"}, "sentiment", "told no changes"),
            ({"q": float("nan")}, "sentiment", "told no changes"),
            ({"q": 1.0}, "../x", r"\(404\): there is no adapter '..%2Fx'"),
        ):
            fake.moved = moved
            with pytest.raises(Refused, match=said):
                run(Server(connect(fake.url)).changes(name))
    with pytest.raises(Refused, match="No answer"):
        run(Server(connect(fake.url)).changes("x"))


def test_a_name_cannot_reach_another_route():
    with FakeServer(admin_key="secret") as fake:
        with pytest.raises(Refused):
            run(Server(connect(fake.url)).delete("secret", "../../admin/fold"))
        assert fake.changes[0][1] == "/v1/adapters/..%2F..%2Fadmin%2Ffold"


def test_the_real_server_takes_no_request_of_the_page_for_its_own_users():
    headers = pytest.importorskip("starlette.datastructures").Headers
    guard = pytest.importorskip("secura_serve.serve.app.http.guard")
    assert guard.not_direct(headers({"host": "127.0.0.1:8000"}), "127.0.0.1") is None
    via = headers({"host": "127.0.0.1:8000", **VIA})
    assert "header via" in guard.not_direct(via, "127.0.0.1")


def test_metrics_become_rates_and_a_restart_is_no_loss():
    text = '# TYPE t counter\nt_total{adapter="a"} 5\nt_total{adapter="b"} 7\n'
    sample = read(text, 1.0)
    assert sample.numbers["t_total"] == 12 and sample.by_label["t_total"] == {"a": 5, "b": 7}
    history = History(Server(connect("http://127.0.0.1:9/v1")))
    for at, value in ((0.0, 10), (2.0, 30), (4.0, 3), (6.0, 5)):
        history.samples.append(read(f"# TYPE t counter\nt_total {value}\n", at))
    assert history.rates("t_total") == [(-4.0, 10.0), (0.0, 1.0)]
    run(history.sample())
    assert "No server answers" in history.problem
