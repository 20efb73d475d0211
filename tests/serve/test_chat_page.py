"""The chat page in a real browser, beside a real server: from the prompt to the last token.

Proves that base and adapter stream side by side from a running secura-serve, that the gallery shows
what it serves, that its metrics become numbers, and that the page asks no other host for anything.
What needs no engine is proved in tests/demo, against a scripted server.

Needs gradio, openai, playwright (the Python package), Chromium, and the `served` fixture: `.url`
(ends in /v1), `.base` and `.adapters`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.support.browser import chromium, open_page, running_page

# How much text each answer showed at each redraw: more than two lengths mean that it streamed.
WATCH = """() => { window.lengths = {1: [], 2: []}; new MutationObserver(() => {
  for (const i of [1, 2]) window.lengths[i].push(
    document.querySelector(`#chat-${i}`).innerText.length);
}).observe(document.body, {childList: true, subtree: true, characterData: true}); }"""


def test_base_and_adapter_stream_side_by_side(served: Any, tmp_path: Path) -> None:
    pair = [served.base, served.adapters[0]]
    with running_page(served.url, tmp_path / "log") as url, chromium() as browser:
        page = open_page(
            browser, f"{url}?models={','.join(pair)}&max_tokens=64&prompt=Tell+a+story"
        )
        page.locator("#status p.up", has_text=served.base).wait_for(timeout=30_000)
        page.wait_for_function("document.querySelector('#prompt textarea').value.length > 3")
        page.evaluate(WATCH)
        page.locator("#prompt textarea").press("Enter")
        page.wait_for_function(
            "document.querySelectorAll('.figures[data-state=done]').length === 2", timeout=180_000
        )
        for column, name in enumerate(pair, start=1):
            figures = page.locator(f"#figures-{column}").inner_text()
            assert name in figures and float(figures.split(" tokens/s")[0].split()[-1]) > 0
            assert page.locator(f"#chat-{column} .bot.message").inner_text().strip()
            lengths = page.evaluate("window.lengths")[str(column)]
            assert len(set(lengths)) > 2, "it came in one piece"
        page.get_by_role("tab", name="Adapters").click()
        cards = page.locator("#cards article", has_text=served.adapters[0])
        assert "a LoRA of this rank" in cards.first.inner_text()
        page.get_by_role("tab", name="Live").click()
        page.locator("#traffic-table", has_text=served.adapters[0]).wait_for(timeout=30_000)
        assert page.hosts == {"127.0.0.1"}, "the page must work offline"
        assert not page.problems
