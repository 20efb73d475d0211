"""Start a server and a page on it, drive every tab in a browser, and save pictures for the docs.

    python -m demo.screenshots --out docs/images -- secura-serve --base smollm2-135m

What stands behind `--` is the server's command; port, key and `--no-ui` are added to it. Needs
playwright, and Chromium on the path.
"""

from __future__ import annotations

import argparse
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import sync_playwright

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]
START_LIMIT_S = 600
PROMPT = "Write this date in the format YYYY-MM-DD: Sunday, July 20, 1969"
MODELS = ("{base}", "iso-date", "iso-date-bounded")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the pictures")
    parser.add_argument("--page-flag", action="append", default=[], help="passed on to the page")
    parser.add_argument("server", nargs="+", help="the server's command")
    args = parser.parse_args(argv)
    chromium = find_chromium()
    args.out.mkdir(parents=True, exist_ok=True)
    port, page_port = _free_port(), _free_port()
    endpoint, url = f"http://127.0.0.1:{port}/v1", f"http://127.0.0.1:{page_port}/"
    own = ["--no-ui", "--port", str(port), "--admin-api-key", "for-the-pictures"]
    page = [sys.executable, "-m", "demo.app", "--endpoint", endpoint, "--port", str(page_port)]
    with (
        _running([*args.server, *own], f"http://127.0.0.1:{port}/health"),
        _running([*page, *args.page_flag], url),
        sync_playwright() as playwright,
    ):
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        for name, width, dark in (("wide", 1280, False), ("phone", 390, True)):
            window = browser.new_page(
                viewport={"width": width, "height": 960 if width > 600 else 800},
                color_scheme="dark" if dark else "light",
                device_scale_factor=1.5,
            )
            for picture in draw(window, url, few=width < 600):
                file = args.out / f"{picture}-{name}.png"
                # The chat fills the window: its prompt stays at the foot.
                window.screenshot(path=file, full_page=picture != "chat")
                # A page has few colours: a third of the bytes. The rare ones are marks and stay.
                few = Image.open(file).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE)
                few.save(file, optimize=True)
                print(file, flush=True)
        browser.close()


def find_chromium() -> str:
    """Return the browser's path; end the process if there is none."""
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        raise SystemExit(
            "chromium is not on the path: install it (Debian: apt-get install chromium)"
        )
    return path


def draw(page: Any, url: str, *, few: bool) -> Iterator[str]:
    """Drive the page from tab to tab, and yield the name of each as it is ready."""
    page.goto(url)
    page.wait_for_function("document.querySelector('#model-2 input')?.value", timeout=60_000)
    base = page.locator("#model-1 input").input_value().removesuffix(" (base)")
    models = [name.format(base=base) for name in MODELS[: 2 if few else 3]]
    page.goto(f"{url}?models={','.join(models)}&prompt={PROMPT}&max_tokens=150")
    page.wait_for_function("document.querySelector('#prompt textarea')?.value")
    page.wait_for_function(f"document.querySelector('#model-{len(models)} input')?.value")
    page.locator("#prompt textarea").press("Enter")
    page.wait_for_function(
        f"document.querySelectorAll('.figures[data-state=done]').length === {len(models)}",
        timeout=180_000,
    )
    page.locator("#difference-2").wait_for()
    page.wait_for_timeout(500)
    yield "chat"
    if few:
        return
    page.get_by_role("tab", name="Adapters").click()
    page.locator("#cards article").first.wait_for()
    yield "adapters"
    page.get_by_role("tab", name="Retention").click()
    page.locator("#kept dl").wait_for()
    # The one that the experiment was made with.
    page.locator("#kept-adapter input").click()
    page.get_by_role("option", name="iso-date", exact=True).click()
    page.locator("#kept", has_text="0.895").wait_for()
    page.locator("#ask-questions").click()
    page.locator("#questions caption", has_text="12 of 12 answered").wait_for(timeout=180_000)
    page.locator("#show-layers").click()
    page.locator("#layers table").wait_for(timeout=60_000)
    page.wait_for_timeout(1000)
    yield "retention"
    page.get_by_role("tab", name="Live").click()
    page.locator("#traffic-table table").wait_for(timeout=30_000)
    page.get_by_role("tab", name="Chat").click()
    page.locator("#prompt textarea").fill("Tell me a long story about a river.")
    page.locator("#prompt textarea").press("Enter")
    page.get_by_role("tab", name="Live").click()
    page.wait_for_timeout(12_000)
    yield "live"


@contextmanager
def _running(command: Sequence[str], url: str) -> Iterator[None]:
    """Start a process and wait until it answers; end it afterwards."""
    process = subprocess.Popen(command, stdout=sys.stderr)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        deadline = time.monotonic() + START_LIMIT_S
        while True:
            try:
                opener.open(url, timeout=5).close()
                break
            except (urllib.error.URLError, OSError):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit(f"{command[0]} does not answer at {url}") from None
                time.sleep(0.5)
        yield
    finally:
        process.terminate()
        process.wait(timeout=60)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    main()
