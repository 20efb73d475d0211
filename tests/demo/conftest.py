"""One browser, and one page on one scripted server that every test scripts anew."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.browser import chromium, open_page, running_page
from tests.support.engines import free_port
from tests.support.fake_server import FakeServer

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
        yield SimpleNamespace(url=url, port=port, log=folder / "log")


@pytest.fixture
def server(place: SimpleNamespace) -> Iterator[FakeServer]:
    """A server that runs, unless the test stops it."""
    fake = FakeServer(port=place.port)
    with fake:
        yield fake


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
