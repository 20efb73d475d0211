"""The chat tab in a real browser, against a scripted server.

Proves that one prompt goes to all columns and streams back as Markdown; turns, retry, edit, stop,
clear, mixes, differences, links and commands; keys; that what a model writes stays text; and that
each refusal, break or absence of the server is told, and gone when its cause is.

Needs gradio, openai, playwright (the Python package) and Chromium.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
from playwright.sync_api import expect

from tests.demo.conftest import REMEMBERED_S
from tests.support.browser import open_page, scroll_width, send, windows
from tests.support.fake_server import BASE, FakeServer, Script, adapter_card

pytestmark = pytest.mark.long
MARKDOWN = (
    "# Title\n\n", "Some **bold** text:\n\n", "```python\nprint('<b>')\n", "```\n\n",
    "| a | b |\n|---|---|\n| 1 | 2 |\n", "\n- item",
)  # fmt: skip
ENDLESS = Script(("word ",) * 2000, wait_s=0.05)
# How much text the second column showed at each redraw.
WATCH = """() => { window.lengths = []; new MutationObserver(() => window.lengths.push(
  document.querySelector('#chat-2').innerText.length)).observe(
  document.querySelector('#chat-2'), {childList: true, subtree: true, characterData: true}); }"""
# What has the focus shows it, and no list of another box is open.
RINGED = """() => { const e = document.activeElement;
  const open = [...document.querySelectorAll('[role=listbox]')].filter((list) =>
    list.checkVisibility() && !list.closest('.block').contains(e));
  return !open.length && (e === document.body || getComputedStyle(e).outlineStyle !== 'none'); }"""
# Figures that are there now; a redraw replaces them.
MARK = "document.querySelectorAll('.figures').forEach(each => each.dataset.old = '')"
FRESH = ".figures[data-state]:not([data-old])"
HOSTILE = (
    "<img src=x onerror=\"document.title='owned'\">\n\n"
    "<script>document.title='owned'</script>\n\n"
    "<style>body{display:none}</style><form id=send action=http://evil.test><input></form>\n\n"
    "<iframe srcdoc='<script>parent.document.title=1</script>'></iframe>\n\n"
    "![x](http://evil.test/x.png) [click](javascript:document.title='owned')\n\n"
    "<svg/onload=document.title='owned'> <div style='position:fixed;inset:0'>over</div>\n\n"
    "```mermaid\ngraph TD\n A[<img class=evil src=http://evil.test/m.png>]\n```\n\n"
    "[a]:\n```\n<img class=evil src=http://evil.test/y.png onerror=\"document.title='owned'\">\n\n"
    "$$\\href{javascript:document.title='owned'}{x}$$ {{7*7}} ${value}"
)


def ask(page: Any, prompt: str, *, wait: bool = True) -> None:
    """Write a prompt and press Enter; wait until all columns have answered."""
    page.evaluate(MARK)
    send(page, prompt)
    if wait:
        redrawn(page, page.locator("[id^=model-]:visible").count())
        settled(page)


def after(page: Any, server: FakeServer, requests: int, act: Callable[[], None]) -> None:
    """Do something that asks the server so many times, and wait until it has answered."""
    wanted = len(server.asked) + requests
    page.evaluate(MARK)
    act()
    deadline = time.monotonic() + 20
    while len(server.asked) < wanted and time.monotonic() < deadline:
        page.wait_for_timeout(50)
    redrawn(page, requests)
    settled(page)
    assert len(server.asked) == wanted


def redrawn(page: Any, columns: int) -> None:
    """Wait until so many columns show figures that came after `MARK`."""
    page.wait_for_function(f"document.querySelectorAll('{FRESH}').length >= {columns}")


def settled(page: Any) -> None:
    """Wait until nothing is asked any more."""
    page.wait_for_function(
        "document.querySelector('#stop').disabled && !document.querySelector('#send').disabled "
        "&& !document.querySelector('[data-state=waiting], [data-state=streaming]')",
        timeout=30_000,
    )


def choose(page: Any, column: int, model: str) -> None:
    box = page.locator(f"#model-{column} input")
    box.click()
    box.fill(model)
    box.press("Enter")
    box.press("Tab")


def states(page: Any) -> list[str | None]:
    return [each.get_attribute("data-state") for each in page.locator(".figures:visible").all()]


def answer(page: Any, column: int) -> Any:
    return page.locator(f"#chat-{column} .bot.message").last


def docked(page: Any) -> bool:
    """Return whether prompt and Send are seen, with the page scrolled to its top."""
    page.evaluate("window.scrollTo(0, 0)")
    boxes = [page.locator(part).bounding_box() for part in ("#prompt textarea", "#send")]
    page.locator("#prompt textarea").focus()
    ends = all(box["y"] > 0 and box["y"] + box["height"] <= 900 for box in boxes)
    return ends and page.evaluate("window.scrollY") == 0


@windows("1280 light", "390 dark")
def test_a_conversation_from_the_first_prompt_to_the_cleared_page(
    server: FakeServer, visit: Callable[..., Any], window: dict[str, Any]
) -> None:
    server.scripts = {"iso-date": Script(MARKDOWN, wait_s=0.25)}
    page = visit(**window)
    page.evaluate(WATCH)
    assert docked(page)
    ask(page, "Hello?\nAnd?")
    assert docked(page)
    assert states(page) == ["done", "done"]
    assert len(set(page.evaluate("window.lengths"))) > 2, "it came in one piece"
    told = answer(page, 2)
    assert told.locator("strong").inner_text() == "bold" and told.locator("h1").count() == 1
    assert told.locator("td").all_inner_texts() == ["1", "2"] and told.locator("li").count() == 1
    assert "print('<b>')" in told.locator("pre code").inner_text()
    figures = page.locator("#figures-2").inner_text()
    assert "6 tokens" in figures and "tokens/s" in figures and "first token" in figures
    marked = page.locator("#difference-2")
    assert marked.inner_text().count("Title") and marked.bounding_box()["height"] < 250
    words = marked.locator(".text").first.evaluate("e => getComputedStyle(e).wordBreak")
    assert words == "normal"
    expect(page.locator("#prompt textarea")).to_have_value("")
    assert {body["model"] for body in server.asked} == {BASE, "iso-date"}

    ask(page, "Once more")
    said = [[m["content"] for m in body["messages"]] for body in server.asked[2:]]
    assert ["Hello?\nAnd?", "The capital of France is **Paris**.", "Once more"] in said
    assert ["Hello?\nAnd?", "".join(MARKDOWN), "Once more"] in said

    after(page, server, 2, page.locator("#retry").click)
    assert [len(body["messages"]) for body in server.asked] == [1, 1, 3, 3, 3, 3]
    after(page, server, 1, page.locator("#chat-1").get_by_label("Retry").first.click)
    assert server.asked[-1]["model"] == BASE

    # An edited turn is asked again by all columns that said the same; what came after it is gone.
    page.locator("#chat-1").get_by_label("Edit").first.click()
    page.locator("#chat-1 textarea").fill("Bye?")
    after(page, server, 2, page.locator("#chat-1").get_by_label("Submit").click)
    assert [[m["content"] for m in b["messages"]] for b in server.asked[7:]] == [["Bye?"]] * 2
    assert page.locator("#chat-2 .user.message").all_inner_texts() == ["Bye?"]

    page.locator("#clear").click()
    page.locator("#chat-1 .message").first.wait_for(state="detached")
    ask(page, "New")
    assert len(server.asked[-1]["messages"]) == 1
    assert scroll_width(page) <= window["width"]


def test_what_a_model_writes_stays_text(server: FakeServer, visit: Callable[..., Any]) -> None:
    pieces = tuple(HOSTILE[i : i + 7] for i in range(0, len(HOSTILE), 7))
    card = adapter_card("evil", task="<img src=x onerror=\"document.title='owned'\">")
    card["examples"] = ["<img src=x onerror=\"document.title='owned'\">"]
    server.adapters.append(card)
    server.scripts = {BASE: Script(pieces, wait_s=0), "evil": Script(refusal=(400, HOSTILE))}
    page = visit()
    choose(page, 2, "evil")
    ask(page, HOSTILE)
    assert states(page) == ["done", "failed"]
    chats = page.locator("#columns")
    assert chats.locator(".mermaid").count() == 0
    for kind in ("img:not([src^='/']):not([src^='data:'])", "iframe", "form", "script", "style"):
        assert chats.locator(f".message {kind}, .figures {kind}").count() == 0, kind
    assert (
        chats.locator(".message [onerror], .message [onload], .message [style*=fixed]").count() == 0
    )
    assert chats.locator(".message a[href^='javascript']").count() == 0
    assert "<style>body{display:none}</style>" in answer(page, 1).inner_text().replace("\u2060", "")
    for tab in ("Adapters", "Retention", "Live", "Chat"):
        page.get_by_role("tab", name=tab).click()
        page.wait_for_timeout(500)
    assert page.title() == "secura-serve"
    assert page.locator("#send").count() == 1 and page.locator("#send").is_visible()
    # The second wall: even markup that got in could not ask another host.
    assert page.hosts == {"127.0.0.1"} and not page.problems
    failures: list[str] = []
    page.on("requestfailed", lambda request: failures.append(f"{request.url} {request.failure}"))
    page.evaluate("document.body.append(Object.assign(new Image(), {src: 'http://evil.test/z'}))")
    page.wait_for_timeout(500)
    assert failures == ["http://evil.test/z csp"]
    assert page.problems and "Content Security Policy" in page.problems[0]
    page.problems.clear()
    page.hosts.discard("evil.test")


def test_keys_stop_and_a_line_break(server: FakeServer, visit: Callable[..., Any]) -> None:
    server.scripts = {BASE: ENDLESS, "iso-date": ENDLESS}
    page = visit()
    prompt = page.locator("#prompt textarea")
    prompt.focus()
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    assert prompt.input_value() == "one\ntwo" and not server.asked
    page.keyboard.press("Enter")
    answer(page, 2).get_by_text("word word").wait_for()
    page.keyboard.press("Escape")
    settled(page)
    assert states(page) == ["stopped", "stopped"]
    assert server.asked[0]["messages"][-1]["content"] == "one\ntwo"
    ask(page, "again", wait=False)
    answer(page, 1).get_by_text("word word").wait_for()
    page.locator("#stop").click()
    settled(page)
    assert "stopped" in page.locator("#figures-1").inner_text()
    ask(page, "and again", wait=False)
    answer(page, 1).get_by_text("word word").wait_for()
    page.locator("#clear").click()
    settled(page)
    assert page.locator("[id^=chat-] .message, [id^=figures-] p").count() == 0
    # Everything can be reached by the keyboard, from the tabs to the last panel.
    page.locator("body").focus()
    reached = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        assert page.evaluate(RINGED), page.evaluate("document.activeElement.outerHTML")
        reached.add(
            page.evaluate("document.activeElement.closest('[id]:not([id^=component])')?.id")
        )
    for part in (
        "count",
        "model-1",
        "prompt",
        "send",
        "retry",
        "clear",
        "settings",
        "mix",
        "share",
    ):
        assert any(part in str(each) for each in reached), (part, reached)


@windows("1280 light", "390 dark")
def test_sliders_write_a_mix_and_four_columns_ask_at_once(
    server: FakeServer, visit: Callable[..., Any], window: dict[str, Any]
) -> None:
    page = visit(**window)
    page.locator("#count").get_by_label("4").check()
    page.locator("#model-4 input").wait_for()
    assert docked(page)
    choose(page, 3, "sentiment@0f1e2d3c4b5a")
    page.locator("#mix > button").click()
    page.locator("#mix-column").get_by_label("4").check()
    for name in ("sentiment", "iso-date"):
        page.locator("#mix-parts input").click()
        page.get_by_role("option", name=name, exact=True).click()
    page.keyboard.press("Escape")
    # The choice of the second part draws the sliders anew; what is typed before that is lost.
    page.locator("#weight-2 input[type=number]").wait_for()
    page.wait_for_function(
        "document.querySelector('#model-4 input').value === 'sentiment+iso-date'"
    )
    weight = page.locator("#weight-1 input[type=number]")
    weight.fill("0.5")
    weight.press("Tab")
    page.wait_for_function(
        "document.querySelector('#model-4 input').value === 'sentiment*0.5+iso-date'"
    )
    said = page.locator("#mix-expression textarea, #mix-expression input").first
    expect(said).to_have_value("sentiment*0.5+iso-date")
    ask(page, "Hello")
    assert states(page) == ["done"] * 4
    assert {body["model"] for body in server.asked} == {
        BASE,
        "iso-date",
        "sentiment@0f1e2d3c4b5a",
        "sentiment*0.5+iso-date",
    }
    expect(page.locator("[id^=difference-]:visible")).to_have_count(3)
    page.locator("#marked input").uncheck()
    page.locator("#difference-2").wait_for(state="hidden")


@windows("390 dark", "1280 light")
def test_a_link_and_the_commands_repeat_what_was_asked(
    server: FakeServer, visit: Callable[..., Any], browser: Any, window: dict[str, Any]
) -> None:
    page = visit(**window)
    choose(page, 2, "sentiment*0.5+iso-date")
    page.locator("#settings > button").click()
    page.wait_for_timeout(500)  # What is typed while a panel opens is lost; nobody is so fast.
    page.locator("#system textarea").fill("Be brief.")
    page.locator("#max-tokens input[type=number]").fill("5")
    page.locator("#max-tokens input[type=number]").press("Tab")
    page.locator("#prompt textarea").fill("What's 'this' & <that>?")
    page.locator("#share > button").click()
    page.locator("#share-write").click()
    page.wait_for_function("document.querySelector('#share-link textarea')?.value.includes('?')")
    link, curl, python = (
        page.locator(f"#share-{name} textarea").input_value() for name in ("link", "curl", "python")
    )
    assert "system=Be+brief." in link and "max_tokens=5" in link
    after(page, server, 2, page.locator("#send").click)
    asked = [{k: v for k, v in body.items() if "stream" not in k} for body in server.asked]
    server.asked.clear()
    env = {"PATH": "/usr/bin:/bin", "NO_PROXY": "*"}
    subprocess.run(["bash", "-c", curl], env=env, check=True, capture_output=True)
    # The scripted server streams to everybody, so the program's own reading fails, not its asking.
    subprocess.run([sys.executable, "-c", python], env=env, capture_output=True)
    order = lambda bodies: sorted(bodies, key=lambda body: body["model"])  # noqa: E731
    assert order(server.asked[:2]) == order(asked)
    assert server.asked[2] in asked

    other = open_page(browser, link, **window)
    # Gradio loses what it fills in while a panel is being opened.
    other.locator("#status p.up", has_text="at http").wait_for(timeout=20_000)
    expect(other.locator("#prompt textarea")).to_have_value("What's 'this' & <that>?")
    expect(other.locator("#model-2 input")).to_have_value("sentiment*0.5+iso-date")
    other.locator("#settings > button").click()
    expect(other.locator("#system textarea")).to_have_value("Be brief.")
    expect(other.locator("#max-tokens input[type=number]")).to_have_value("5")
    other.close()


def test_an_example_of_a_card_fills_prompt_and_models(
    server: FakeServer, visit: Callable[..., Any]
) -> None:
    page = visit()
    page.locator("#examples").get_by_text("sentiment · An example for sentiment.").click()
    expect(page.locator("#prompt textarea")).to_have_value("An example for sentiment.")
    page.wait_for_function("document.querySelector('#model-2 input').value === 'sentiment'")
    expect(page.locator("#prompt textarea")).to_be_focused()
    page.keyboard.press("Enter")
    answer(page, 2).get_by_text("Paris").wait_for()
    # A column that comes up has a model that no other shows.
    choose(page, 2, "iso-date")
    page.locator("#mix > button").click()
    expect(page.locator("#mix-column label")).to_have_count(2)
    page.locator("#count").get_by_label("3").check()
    expect(page.locator("#model-3 input")).to_have_value("sentiment")
    expect(page.locator("#mix-column label")).to_have_count(3)


def test_a_server_that_refuses_breaks_off_or_goes_and_comes_back(
    server: FakeServer, visit: Callable[..., Any]
) -> None:
    server.scripts = {
        "iso-date": Script(refusal=(409, "'iso-date' waits for an unfold")),
        "sentiment": Script(("half ",) * 20, wait_s=0.02, cut=True),
    }
    page = visit()
    page.locator("#count").get_by_label("3").check()
    page.locator("#model-3 input").wait_for()
    choose(page, 3, "sentiment")
    ask(page, "Hello")
    assert states(page) == ["done", "failed", "failed"]
    assert "(409): 'iso-date' waits for an unfold" in answer(page, 2).inner_text()
    assert "no answer" in page.locator("#figures-2").inner_text()
    assert "broke off" in page.locator("#figures-3").inner_text()
    half = answer(page, 3).inner_text()
    assert "half half" in half and "This answer broke off." in half

    server.__exit__()
    page.locator("#status p.down", has_text="No server answers").wait_for(timeout=20_000)
    ask(page, "Anybody?")
    assert states(page) == ["failed"] * 3
    expect(page.locator("#model-2 input")).to_have_value("iso-date")
    server.scripts = {}
    server.slow_s = 0.5
    server.adapters.append(adapter_card("newer"))
    server.__enter__()
    page.locator("#status p.up", has_text="3 adapters").wait_for(timeout=20_000)
    after(page, server, 3, page.locator("#retry").click)
    assert states(page) == ["done"] * 3


def test_a_page_that_finds_no_server_fills_itself_later(place: Any, browser: Any) -> None:
    time.sleep(REMEMBERED_S)
    page = open_page(browser, place.url)
    page.locator("#status p.down", has_text="No server answers").wait_for(timeout=20_000)
    with FakeServer(port=place.port):
        page.locator("#status p.up").wait_for(timeout=20_000)
        page.wait_for_function("document.querySelector('#model-2 input').value === 'iso-date'")
        ask(page, "Hello")
        assert states(page) == ["done", "done"]
    assert not page.problems
    page.close()
