"""One browser, and one page on one scripted server that every test scripts anew."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.browser import chromium, open_page, running_page
from tests.support.engines import free_port
from tests.support.fake_server import FakeServer

REMEMBERED_S = 2.0
"""Longer than the page's process keeps what a server offers."""
MATRIX = {
    "name": "four tasks",
    "tasks": ["one", "two"],
    "accuracy": "exact_match",
    "matrix": {"exact_match": [[0.9, 0.1], [0.6, 0.8]]},
}
SUMMARY = {
    "single": {
        "lora": {"score": {"mean": 0.9}, "kl": {"mean": 0.078}},
        "broken": {"score": {"mean": 0.03}, "kl": {"mean": 4.4}},
    }
}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Start a browser for one file's tests: while Playwright lives, its event loop counts as
    running, so that `asyncio.run` of a test elsewhere would fail."""
    with chromium() as started:
        yield started


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """The page's address and its server's port; the server itself is each test's own."""
    folder: Path = tmp_path_factory.mktemp("page")
    flags = []
    for name, content in (("continual.json", MATRIX), ("summary.json", SUMMARY)):
        (folder / name).write_text(json.dumps(content))
        flags += ["--results", str(folder / name)]
    port = free_port()
    with running_page(f"http://127.0.0.1:{port}/v1", folder / "log", *flags) as url:
        yield SimpleNamespace(url=url, port=port, log=folder / "log", stale_until=0.0)


@pytest.fixture
def server(place: SimpleNamespace) -> Iterator[FakeServer]:
    """A server that runs, unless the test stops it."""
    # The page's process would show the last test's adapters for a moment.
    time.sleep(max(0.0, place.stale_until - time.monotonic()))
    fake, usual = FakeServer(port=place.port), _offer(FakeServer())
    with fake:
        yield fake
    if _offer(fake) != usual:
        place.stale_until = time.monotonic() + REMEMBERED_S


def _offer(server: FakeServer) -> tuple[object, ...]:
    return server.adapters, server.admin_key, server.api_key, server.plain, server.folded


@pytest.fixture
def visit(browser: Any, place: SimpleNamespace) -> Iterator[Callable[..., Any]]:
    """`visit(query="", width=1280, dark=False)`: open the page; console errors fail the test."""
    pages = []

    def go(query: str = "", *, tab: str = "Chat", **window: Any) -> Any:
        page = open_page(browser, place.url + query, **window)
        pages.append(page)
        page.locator("#status p.up", has_text="at http").wait_for(timeout=20_000)
        filled = "document.querySelector('#model-2 input')?.value || location.search.includes('=')"
        page.wait_for_function(filled)
        if tab != "Chat":
            page.get_by_role("tab", name=tab).click()
        return page

    yield go
    problems = [problem for page in pages for problem in page.problems]
    hosts = {host for page in pages for host in page.hosts}
    for page in pages:
        page.close()
    assert not problems, problems
    assert hosts <= {"127.0.0.1", None}, "the page must work offline"
