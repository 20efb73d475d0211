"""The chat page in a real browser, beside a real server: from the prompt to the last token.

Proves that base and adapter stream side by side from a running secura-serve; that a mix and a
full-rank adapter answer there as they do without the page; that the gallery shows what the server
has, its weights are compared layer by layer, its metrics become numbers, and that the page asks no
other host for anything. What needs no engine is proved in tests/demo, against a scripted server.

Needs gradio, openai, playwright (the Python package), Chromium, and the `served` fixture: `.url`
(ends in /v1), `.base` and `.adapters`.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from openai import OpenAI

from demo.adapters.words import number
from tests.support.browser import chromium, open_page, running_page

# How much text each answer showed at each redraw: more than two lengths mean that it streamed.
WATCH = """() => { window.lengths = {1: [], 2: []}; new MutationObserver(() => {
  for (const i of [1, 2]) window.lengths[i].push(
    document.querySelector(`#chat-${i}`).innerText.length);
}).observe(document.body, {childList: true, subtree: true, characterData: true}); }"""
DATE = "Write this date in the format YYYY-MM-DD: Sunday, July 20, 1969"


@pytest.fixture(scope="module")
def place(served: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """The page on the session's server, and a browser."""
    log = tmp_path_factory.mktemp("page") / "log"
    with running_page(served.url, log) as url, chromium() as browser:
        yield SimpleNamespace(url=url, browser=browser)


def ask(place: Any, served: Any, models: list[str], prompt: str, watch: str = "") -> Any:
    """Open the page, send a prompt to the models, and wait for all answers."""
    query = f"?models={quote(','.join(models))}&max_tokens=64&prompt={quote(prompt)}"
    page = open_page(place.browser, place.url + query)
    page.locator("#status p.up", has_text=served.base).wait_for(timeout=30_000)
    page.wait_for_function("document.querySelector('#prompt textarea').value.length > 3")
    page.wait_for_function(f"document.querySelector('#model-{len(models)} input')?.value")
    if watch:
        page.evaluate(watch)
    page.locator("#prompt textarea").press("Enter")
    done = f"document.querySelectorAll('.figures[data-state=done]').length === {len(models)}"
    page.wait_for_function(done, timeout=180_000)
    return page


def test_base_and_adapter_stream_side_by_side(served: Any, place: Any) -> None:
    pair = [served.base, served.adapters[0]]
    page = ask(place, served, pair, "Tell a story", WATCH)
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


def test_a_mix_and_a_full_rank_adapter_answer_as_they_do_without_the_page(
    served: Any, place: Any
) -> None:
    models = ["iso-date-bounded", "sentiment*0.5+iso-date"]
    assert models[0] in served.adapters, "it has a place in the engine"
    page = ask(place, served, models, DATE)
    client = OpenAI(base_url=served.url, api_key="none")
    for column, name in enumerate(models, start=1):
        alone = client.chat.completions.create(
            model=name,
            messages=[{"role": "user", "content": DATE}],
            max_tokens=64,
            temperature=0,
        )
        said = " ".join((alone.choices[0].message.content or "").split())
        shown = " ".join(page.locator(f"#chat-{column} .bot.message").inner_text().split())
        assert said and said in shown, (name, said, shown)
        assert name in page.locator(f"#figures-{column}").inner_text()
    page.get_by_role("tab", name="Retention").click()
    page.locator("#kept-adapter input").click()
    page.get_by_role("option", name=models[0], exact=True).click()
    # A choice cancels what was asked for the one before, and Gradio logs where that has just begun.
    card = httpx.get(f"{served.url}/adapters/{models[0]}").json()
    page.locator("#kept", has_text=number(card["retention"]["kl"])).wait_for(timeout=30_000)
    page.locator("#show-layers").click()
    layers = page.locator("#layers table", has_text=models[0])
    layers.wait_for(timeout=60_000)
    assert layers.locator("tbody tr").count() == 30 and layers.locator("td.heat").count() == 210
    assert not page.problems
