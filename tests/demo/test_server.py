"""Proves what the page asks of a server, and that it changes nothing where nobody has a key.

Needs openai and prometheus_client; the server is a scripted one. One test holds the header that
says "somebody else asks" against the real server's rule.
"""

from __future__ import annotations

import asyncio
import math
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("openai")
pytest.importorskip("prometheus_client")
from demo import endpoint
from demo.adapters.card import gallery
from demo.adapters.search import matching
from demo.answer import Answer, summary
from demo.compare import LONGEST_TEXT, Comparison, Settings
from demo.endpoint import VIA, connect
from demo.live.samples import History, read
from demo.server import Refused, Server
from tests.support.fake_server import BASE, FakeServer, Script, adapter_card


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


def test_an_upload_without_the_key_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Path, "open", lambda *_: pytest.fail("it is read"))
    with FakeServer(admin_key="secret") as fake, pytest.raises(Refused, match=r"\(401\)"):
        run(Server(connect(fake.url)).upload("wrong", "new", [tmp_path / "x"] * 1000))
    assert fake.changes == []


ODD = (5, "x", [5], {"a": 1}, None, {"kl": "x", "accuracy": []}, "\ud800", 10**400)


def test_cards_of_any_type_are_shown():
    keys = sorted(adapter_card("a").keys() - {"id"})
    odd = [adapter_card(f"{key}{i}", **{key: ODD[i]}) for key in keys for i in range(len(ODD))]
    with FakeServer(adapters=[*odd, adapter_card("x", id=5, state="refused")]) as fake:
        now = run(Server(connect(fake.url)).snapshot())
    assert len(now.adapters) == len(odd)
    for each in matching(now.adapters, "", "all"):
        shown = gallery([each], now.bases, 1)
        assert "<article" in shown and shown.encode()


def test_a_model_without_a_name_is_told():
    with FakeServer(adapters=[adapter_card("x", id={"a": 1})]) as fake:
        assert "no list of models" in run(Server(connect(fake.url)).snapshot()).problem


def test_a_list_that_drips_is_given_up(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(endpoint, "LIST_S", 0.2)
    with FakeServer(slow_s=1.0) as fake:
        assert "within 0.2 s" in run(Server(connect(fake.url)).snapshot()).problem


@pytest.mark.parametrize("piece", ["a\ud800b", "x" * (LONGEST_TEXT + 1)], ids=["half", "long"])
def test_an_answer_can_be_written_into_the_page(piece: str):
    answer = Answer(BASE)

    async def ask(client: Any) -> None:
        async for _ in Comparison(client, [(answer, [])], Settings()):
            pass

    with FakeServer(scripts={BASE: Script((piece,))}) as fake:
        run(ask(connect(fake.url)))
    assert answer.text.encode() and answer.state == ("done" if len(piece) == 3 else "failed")


def test_speed_and_first_token_are_those_of_the_stream_however_long_a_redraw_takes():
    pace = {"short": 0.02, "long": 0.04}
    answers = [Answer(name) for name in pace]

    async def ask(client: Any) -> None:
        async for _ in Comparison(client, [(answer, []) for answer in answers], Settings()):
            time.sleep(0.4)

    scripts = {name: Script(("word ",) * 20, wait_s=wait) for name, wait in pace.items()}
    with FakeServer(scripts=scripts) as fake:
        run(ask(connect(fake.url)))
    for answer in answers:
        assert answer.state == "done" and answer.tokens == 20
        assert 0.3 < answer.tokens_per_s * pace[answer.model] < 1.1
        assert answer.first_token_s < 0.3


def test_many_tokens_at_once_have_no_speed():
    answer = Answer(BASE)

    async def ask(client: Any) -> None:
        async for _ in Comparison(client, [(answer, [])], Settings()):
            pass

    with FakeServer(scripts={BASE: Script(("word ",) * 4, wait_s=0)}) as fake:
        run(ask(connect(fake.url)))
    assert summary(answer).startswith("4 tokens | first token")


@pytest.mark.parametrize("counted", ["<img src=x>", ["<img>"], -1, float("inf"), 10**50])
def test_what_a_server_counts_is_a_number(counted: Any):
    """openai's client lets any type through, and the count is shown in the page."""

    class Stream:
        async def __aenter__(self) -> Any:
            return self

        async def __aexit__(self, *_: object) -> None: ...

        async def __aiter__(self) -> Any:
            choice = SimpleNamespace(delta=SimpleNamespace(content="a"), finish_reason="stop")
            usage = SimpleNamespace(completion_tokens=counted)
            yield SimpleNamespace(choices=[choice], usage=usage)

    async def create(**_: object) -> Stream:
        return Stream()

    completions = SimpleNamespace(create=create)
    client: Any = SimpleNamespace(
        chat=SimpleNamespace(completions=completions), base_url="http://x"
    )
    answer = Answer(BASE)

    async def ask() -> None:
        async for _ in Comparison(client, [(answer, [])], Settings()):
            pass

    run(ask())
    assert answer.state == "done" and summary(answer).startswith("1 token |")


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
    history.samples.append(read("# TYPE t counter\nt_total 500\n", 60.0))
    assert math.isnan(history.rates("t_total")[-1][1]), "nobody looked: no mean over the gap"
    run(history.sample())
    assert "No server answers" in history.problem
