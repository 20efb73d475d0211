"""The chat page in a real browser, from the checkbox to the last token.

Proves that the page streams the base's and an adapter's answer side by side from a running
secura-serve and asks no other host for anything; and, against a scripted endpoint, that it says so
when no server answers, recovers on Refresh, shows a model's HTML as text, keeps one model's refusal
from the others, and stops.

Needs gradio, openai, playwright (the Python package) and Chromium; the first test needs the
`served` fixture: `.url` (ends in /v1), `.base` and `.adapters`.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import urlopen

import pytest

from tests.support import ROOT
from tests.support.engines import free_port

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]
FINISHED = """document.querySelector('#answers article')
  && !document.querySelector('#answers [aria-busy=true]')"""
# How much text each answer showed at each redraw: more than two lengths mean that it streamed.
WATCH = """() => { window.lengths = {}; new MutationObserver(() => {
  for (const card of document.querySelectorAll('#answers article'))
    (window.lengths[card.dataset.model] ??= []).push(card.querySelector('.text').innerText.length);
}).observe(document.body, {childList: true, subtree: true, characterData: true}); }"""
HOSTILE = "<img src=x onerror=\"document.title='owned'\"> {{value}} ${value} & co"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.fail("Chromium is not on the path; install it (Debian: apt-get install chromium)")
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=chromium, args=FLAGS)


@pytest.fixture
def open_page(browser: Any, tmp_path: Path) -> Iterator[Callable[[str], Any]]:
    """`open_page(endpoint)`: start demo.app on it and load its page."""
    started: list[subprocess.Popen[bytes]] = []

    def start(endpoint: str) -> Any:
        port, log = free_port(), tmp_path / "page.log"
        command = [sys.executable, "-m", "demo.app", "--endpoint", endpoint, "--port", str(port)]
        with log.open("wb") as out:
            started.append(
                subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT)
            )
        deadline = time.monotonic() + 120
        while "http://" not in log.read_text():
            assert started[0].poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        urlopen(f"http://127.0.0.1:{port}/", timeout=30).close()
        page = browser.new_page()
        page.hosts = set()
        page.on("request", lambda request: page.hosts.add(urlsplit(request.url).hostname))
        page.goto(f"http://127.0.0.1:{port}/")
        page.locator("#status [role=status]", has_text=endpoint).wait_for()
        return page

    yield start
    for process in started:
        process.terminate()
        process.wait(timeout=30)


class Scripted(BaseHTTPRequestHandler):
    """An endpoint with a base that writes HTML, an adapter that is refused, one that never ends."""

    def do_GET(self) -> None:
        parents = {"base": None, "refused": "base", "endless": "base"}
        self._json(200, {"data": [{"id": i, "parent": p} for i, p in parents.items()]})

    def do_POST(self) -> None:
        model = json.loads(self.rfile.read(int(self.headers["content-length"])))["model"]
        if model == "refused":
            return self._json(409, {"error": {"message": "'refused' waits for an unfold"}})
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.end_headers()
        for count in range(1, 600 if model == "endless" else 2):
            delta = {"content": "word " if model == "endless" else HOSTILE}
            usage = {"prompt_tokens": 1, "completion_tokens": count, "total_tokens": count + 1}
            chunk = json.dumps({"choices": [{"index": 0, "delta": delta}], "usage": usage})
            try:
                self.wfile.write(f"data: {chunk}\n\n".encode())
            except OSError:
                return
            time.sleep(0.05)
        self.wfile.write(b"data: [DONE]\n\n")

    def _json(self, code: int, body: object) -> None:
        self.send_response(code)
        self.send_header("content-type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, *_: object) -> None:
        pass


def ask(page: Any, prompt: str, *models: str) -> None:
    """Tick exactly these models, write the prompt, press Enter."""
    page.locator("#models .wrap input").first.wait_for()
    for box in page.locator("#models .wrap input").all():
        box.set_checked(box.get_attribute("name") in models)
    page.locator("#prompt textarea").fill(prompt)
    page.locator("#prompt textarea").press("Enter")


def states(page: Any) -> dict[str, str]:
    cards = page.locator("#answers article").all()
    return {card.get_attribute("data-model"): card.get_attribute("data-state") for card in cards}


def test_base_and_adapter_stream_side_by_side(open_page: Callable[[str], Any], served: Any) -> None:
    page = open_page(served.url)
    pair = [served.base, served.adapters[0]]
    page.locator("#settings button").first.click()
    page.locator("#max-tokens input[type=number]").fill("64")
    page.locator("#max-tokens input[type=number]").blur()
    page.evaluate(WATCH)
    ask(page, "Tell me a long story about a river.", *pair)
    page.wait_for_function(FINISHED, timeout=180_000)
    assert states(page) == dict.fromkeys(pair, "done")
    for name in pair:
        card = page.locator(f'#answers article[data-model="{name}"]')
        assert card.locator(".text").inner_text().strip()
        assert float(card.locator("dl div", has_text="tokens/s").locator("dd").inner_text()) > 0
        assert len(set(page.evaluate("window.lengths")[name])) > 2, "it came in one piece"
    assert page.hosts == {"127.0.0.1"}, "the page must work offline"


@pytest.mark.long
def test_no_server_then_refresh_then_refusal_and_stop(open_page: Callable[[str], Any]) -> None:
    port = free_port()
    page = open_page(f"http://127.0.0.1:{port}/v1")
    assert "No server answers at" in page.locator("#status").inner_text()
    server = ThreadingHTTPServer(("127.0.0.1", port), Scripted)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    page.locator("#refresh").click()
    ask(page, "Hello", "base", "refused", "endless")
    page.locator('article[data-model="endless"]', has_text="word word").wait_for()
    page.locator("#stop").click()
    page.wait_for_function(FINISHED)
    assert states(page) == {"base": "done", "refused": "failed", "endless": "stopped"}
    assert page.locator('article[data-model="base"] .text').inner_text() == HOSTILE
    assert page.title() == "secura-serve"
    said = page.locator('article[data-model="refused"]').inner_text()
    assert "The server refused (409): 'refused' waits for an unfold." in said
    server.shutdown()
