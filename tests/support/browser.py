"""The chat page's process, and Chromium to open it in."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import ProxyHandler, build_opener

import pytest

from tests.support import ROOT, warm
from tests.support.engines import free_port

__all__ = ["chromium", "open_page", "running_page", "scroll_width", "send"]


@contextmanager
def chromium() -> Iterator[Any]:
    """Start the browser."""
    from playwright.sync_api import sync_playwright

    from demo.screenshots import FLAGS

    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        pytest.fail("Chromium is not on the path; install it (Debian: apt-get install chromium)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


@contextmanager
def running_page(endpoint: str, log: Path, *flags: str) -> Iterator[str]:
    """Start ``demo.app`` on an endpoint, and give its address once it answers."""
    port = free_port()
    command = [warm.python(), "-m", "demo.app", "--endpoint", endpoint, "--port", str(port)]
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*command, *flags], cwd=ROOT, stdout=out, stderr=subprocess.STDOUT
        )
    try:
        deadline = time.monotonic() + 180
        while "http://" not in log.read_text():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        # The first visit compiles templates.
        build_opener(ProxyHandler({})).open(f"http://127.0.0.1:{port}/", timeout=30).close()
        yield f"http://127.0.0.1:{port}/"
    finally:
        process.terminate()
        process.wait(timeout=30)


def open_page(browser: Any, url: str, *, width: int = 1280, dark: bool = False) -> Any:
    """Open the page; ``.problems`` collects errors of its console, ``.hosts`` whom it asks."""
    page = browser.new_page(
        viewport={"width": width, "height": 900}, color_scheme="dark" if dark else "light"
    )
    page.problems, page.hosts = [], set()
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.on(
        "console",
        lambda said: page.problems.append(said.text) if said.type == "error" else None,
    )
    page.on("request", lambda request: page.hosts.add(urlsplit(request.url).hostname))
    page.goto(url)
    page.locator("#prompt textarea").wait_for()
    return page


def windows(always: str, slow: str) -> pytest.MarkDecorator:
    """Give a test its ``window``: one in every run, the other where slow tests run.

    Args:
        always, slow: width and theme, "390 dark".
    """

    def window(text: str) -> dict[str, Any]:
        width, theme = text.split()
        return {"width": int(width), "dark": theme == "dark"}

    return pytest.mark.parametrize(
        "window",
        [
            pytest.param(window(always), id=always),
            pytest.param(window(slow), id=slow, marks=pytest.mark.slow),
        ],
    )


def scroll_width(page: Any) -> int:
    """Return how wide the page is; more than the window means that something is cut."""
    return int(page.evaluate("document.documentElement.scrollWidth"))


def send(page: Any, prompt: str) -> None:
    """Write a prompt and press Enter; wait until the first column shows it."""
    turns = page.locator("#chat-1 .user.message")
    before = turns.count()
    page.locator("#prompt textarea").fill(prompt)
    page.locator("#prompt textarea").press("Enter")
    turns.nth(before).wait_for()
