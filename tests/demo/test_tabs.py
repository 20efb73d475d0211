"""The retention and live tabs, and what holds for every tab: nothing is cut, nothing shuts out.

Proves that questions are asked of base and adapter, numbers and pictures are those of cards and
files, the live numbers follow the server; and with axe-core that no tab has a serious finding,
in both widths and both themes, and that no tab is wider than the window.

Needs gradio, openai, playwright and axe-playwright-python, and Chromium.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.support.browser import scroll_width, send, windows
from tests.support.fake_server import BASE, FakeServer, Script, adapter_card

pytestmark = pytest.mark.long
TABS = ("Chat", "Adapters", "Retention", "Live")
PANELS = ("settings", "mix", "share", "changes")
# A colour that is still fading in has no contrast yet.
STILL = """() => document.getAnimations().every((a) => a.playState !== 'running'
  || a.effect.getComputedTiming().endTime === Infinity)"""


@windows("390 dark", "1280 light")
def test_an_adapter_is_asked_beside_the_base(
    server: FakeServer, visit: Callable[..., Any], window: dict[str, Any]
) -> None:
    server.scripts = {"sentiment": Script(("positive",))}
    server.adapters.append(adapter_card("bare", scores={}, retention={}))
    page = visit(tab="Retention", **window)
    page.locator("#kept", has_text="0.89").wait_for(timeout=10_000)
    assert "KL to the base" in page.locator("#kept").inner_text()
    page.locator("#front svg.marks").wait_for(timeout=10_000)
    page.locator("#ask-questions").click()
    page.locator("#questions caption", has_text="12 of 12 answered").wait_for(timeout=20_000)
    said = page.locator("#questions caption").inner_text()
    assert "0 in the base's words; of the 1 that the base gets right, 0 still right" in said
    assert {body["model"] for body in server.asked} == {BASE, "sentiment"}
    assert len(server.asked) == 24
    matrix = page.locator(".matrix").first
    assert "four tasks" in matrix.inner_text() and matrix.locator("td.heat").count() == 4
    page.locator("#show-layers").click()
    layers = page.locator("#layers table")
    layers.wait_for(timeout=10_000)
    heads = "layer q k v o gate up down"
    assert " ".join(layers.locator("thead").inner_text().split()) == heads
    rows = layers.locator("tbody tr")
    assert rows.count() == 30 and layers.locator("td.heat").count() == 210
    assert " ".join(rows.last.inner_text().split()) == "29 3.98 3.94 4.00 3.96 3.90 3.92 3.89"
    title = rows.last.locator("td").nth(2).get_attribute("title")
    assert title == "model.layers.29.self_attn.v_proj: 4 %"
    assert layers.locator(".scale").inner_text().split() == [
        "0.00",
        "0.95",
        "1.90",
        "2.86",
        "3.81",
        "and",
        "more",
    ]
    assert scroll_width(page) <= window["width"]
    assert rows.last.bounding_box()["height"] < 25
    assert not _scrolls(layers)
    page.locator("#kept-adapter input").click()
    page.get_by_role("option", name="bare").click()
    page.locator("#kept", has_text="no numbers").wait_for()
    layers.wait_for(state="detached")
    server.adapters[-1] |= {"state": "refused", "reason": "U holds NaN"}
    page.locator("#show-layers").click()
    page.locator("#layers [role=alert]", has_text="(409): bare changes nothing").wait_for()


@windows("1280 light", "390 dark")
def test_the_live_numbers_follow_the_server(
    server: FakeServer, visit: Callable[..., Any], window: dict[str, Any]
) -> None:
    server.scripts = {BASE: Script(("word ",) * 400, wait_s=0.03)}
    page = visit(**window)
    send(page, "Go on")
    server.metrics["vllm:num_requests_running"] = 7
    page.get_by_role("tab", name="Live").click()
    page.locator("#numbers", has_text="requests running").wait_for(timeout=10_000)
    assert page.locator("#numbers dd").first.inner_text() == "7"
    server.metrics["vllm:num_requests_running"] = 8
    page.wait_for_function(
        "document.querySelector('#numbers dd').innerText === '8'", timeout=10_000
    )
    page.locator("#traffic-table", has_text="iso-date").wait_for(timeout=15_000)
    server.metrics['secura_adapter_generation_tokens_total{adapter="iso-date"}'] = 5000
    page.locator("#traffic-table", has_text="5000").wait_for(timeout=10_000)
    page.locator("#speed svg.marks").wait_for(timeout=10_000)
    assert scroll_width(page) <= window["width"]
    server.__exit__()
    page.locator("#numbers", has_text="Trying again").wait_for(timeout=15_000)
    server.__enter__()
    page.wait_for_function("!document.querySelector('#numbers .error')", timeout=15_000)


# Colours depend on the theme and places on the width, so that two windows show both.
@pytest.mark.parametrize(
    ("width", "dark"),
    [
        (1280, False),
        (390, True),
        pytest.param(1280, True, marks=pytest.mark.slow),
        pytest.param(390, False, marks=pytest.mark.slow),
    ],
)
def test_no_tab_has_a_serious_finding_or_is_cut(
    server: FakeServer, visit: Callable[..., Any], width: int, dark: bool
) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    server.admin_key = "secret"
    server.adapters.append(adapter_card("a-rather-long-name-of-an-adapter-that-somebody-uploaded"))
    server.adapters.append(
        {"id": "broken", "object": "adapter", "state": "refused", "reason": "U holds NaN"}
    )
    code = (
        "```python\n# a rather long comment in a line of code that is wider than a phone is\n"
        "import os\n\n\n@decorated\nclass A(B):\n    def f(self, x: int = 1) -> str:\n"
        "        return f'{x!r}' + \"b\" if x is not None and True else len(x) / 2.5e3\n```\n"
        '```json\n{"a": [1, true, null]}\n```\n```html\n<a href="x">b</a>\n```'
    )
    server.scripts = {
        BASE: Script(("| a | b |\n|---|---|\n| 1 | 2 |\n\n", code)),
        "iso-date": Script(refusal=(409, "'iso-date' waits for an unfold")),
    }
    page = visit(width=width, dark=dark)
    send(page, "A prompt with [a link](http://127.0.0.1/) and `code`")
    page.locator("#figures-1 [data-state=done]").wait_for(timeout=20_000)
    found = []
    for tab in TABS:
        page.get_by_role("tab", name=tab).click()
        if tab == "Retention":
            page.locator("#ask-questions").click()
            page.locator("#show-layers").click()
            page.locator("#questions table").wait_for(timeout=20_000)
            page.locator("#layers table").wait_for(timeout=20_000)
        if tab == "Live":
            page.locator("#traffic-table table").wait_for(timeout=20_000)
        for panel in PANELS:
            button = page.locator(f"#{panel} > button")
            if button.count() and button.is_visible():
                button.click()
        page.wait_for_timeout(300)
        page.wait_for_function(STILL)
        for finding in axe.run(page).response["violations"]:
            if finding["impact"] in ("serious", "critical"):
                found += [
                    f"{tab}: {finding['id']}: {n['html'][:150]} {n['failureSummary'][-220:]}"
                    for n in finding["nodes"]
                ]
        assert scroll_width(page) <= width, tab
        assert not _cut(page), tab
        assert not _overlapping(page), tab
    assert not found, "\n".join(found)


def _scrolls(table: Any) -> bool:
    """Return whether a table is wider than the box around it."""
    return bool(table.evaluate("({parentElement: e}) => e.scrollWidth > e.clientWidth"))


def _cut(page: Any) -> list[str]:
    """Return visible controls and labels that reach beyond the box that holds them, or the window.

    What scrolls by itself may be wider: chats, tables, code and examples.
    """
    return page.evaluate(
        """() => [...document.querySelectorAll('button, input:not([type=file]), textarea, label')]
        .filter((e) => e.checkVisibility() && !e.closest('[id^=chat-], .figure-table, #examples'))
        .filter((e) => { const r = e.getBoundingClientRect(), box = e.closest('.form');
          const right = Math.min(innerWidth, box ? box.getBoundingClientRect().right : innerWidth);
          return r.width > 4 && r.right > right + 1; })
        .map((e) => e.outerHTML.slice(0, 150))"""
    )


def _overlapping(page: Any) -> list[list[str]]:
    """Return pairs of visible controls that lie on each other, where neither holds the other.

    Chats scroll by themselves, and prompt and examples stay at the foot: all may lie upon others.
    """
    return page.evaluate(
        """() => {
        const kinds = 'button, input:not([type=file]), textarea, h1, h3';
        const parts = [...document.querySelectorAll(kinds)]
          .filter((e) => e.checkVisibility({checkOpacity: true, checkVisibilityCSS: true}))
          .map((e) => [e, e.getBoundingClientRect()])
          .filter(([e, r]) => r.width > 4 && r.height > 4 && !e.closest('#dock, [id^=chat-]'));
        const cut = (a, b) => Math.min(a.right, b.right) - Math.max(a.left, b.left) > 3
          && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 3;
        const pairs = [];
        for (const [i, [a, ra]] of parts.entries())
          for (const [b, rb] of parts.slice(i + 1))
            if (cut(ra, rb) && !a.contains(b) && !b.contains(a))
              pairs.push([a.outerHTML.slice(0, 120), b.outerHTML.slice(0, 120)]);
        return pairs; }"""
    )
