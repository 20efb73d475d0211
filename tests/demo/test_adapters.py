"""The adapters tab in a real browser, against a scripted server.

Proves that the gallery shows, searches and filters; that a server without an admin key is shown and
left unchanged; and that with the key each change is sent, refused changes are told, and the key is
kept nowhere in the browser.

Needs gradio, openai, playwright (the Python package) and Chromium.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import expect

from tests.support.browser import scroll_width, windows
from tests.support.fake_server import FakeServer, adapter_card

pytestmark = pytest.mark.long
KEY = "the-admin-key-of-this-test"


def names(page: Any) -> list[str]:
    return page.locator("#cards h3").all_inner_texts()


def press(page: Any, button: str, said: str) -> None:
    page.locator(f"#{button}").click()
    page.locator(".block.changed", has_text=said).wait_for(timeout=15_000)


def choose(page: Any, box: str, option: str) -> None:
    page.locator(f"#{box} input").click()
    page.get_by_role("option", name=option).click()


@windows("390 light", "1280 dark")
def test_the_gallery_shows_searches_and_takes_no_changes_without_a_key(
    server: FakeServer, visit: Callable[..., Any], window: dict[str, Any]
) -> None:
    broken = {"id": "broken", "object": "adapter", "state": "refused", "reason": "U holds NaN"}
    lora = adapter_card("plain", type="lora", magnorm=None, state="resident", lora_size=None)
    server.adapters += [broken, lora]
    page = visit(tab="Adapters", **window)
    page.locator("#cards", has_text="4 adapters").wait_for(timeout=10_000)
    assert names(page) == ["sentiment", "iso-date", "broken", "plain"]
    assert "U holds NaN" in page.locator("#cards").inner_text()
    assert "Read-only" in page.locator("#notice").inner_text()
    assert not page.locator("#changes").is_visible() and page.locator("#admin-key").count() == 0
    page.locator("#search textarea, #search input").first.fill("senti trained")
    page.wait_for_function("document.querySelectorAll('#cards h3').length === 1")
    page.locator("#search textarea, #search input").first.fill("")
    choose(page, "filter", "LoRA")
    page.wait_for_function("document.querySelector('#cards h3')?.innerText === 'plain'")
    assert scroll_width(page) <= window["width"]
    choose(page, "filter", "all")
    facts = " ".join(page.locator("#cards article", has_text="iso-date").inner_text().split())
    for fact in ("0.89 accuracy, the base 0.505", "moved by KL 0.138", "39 MB (39.4 times)"):
        assert fact in facts
    with page.expect_popup() as opened:
        page.locator("#cards article", has_text="iso-date").get_by_role("link").click()
    other = opened.value
    other.wait_for_function("document.querySelector('#model-2 input')?.value === 'iso-date'")
    expect(other.locator("#prompt textarea")).to_have_value("An example for iso-date.")
    other.close()
    assert server.changes == []


@windows("1280 light", "390 dark")
def test_the_operator_changes_adapters_and_the_key_is_kept_nowhere(
    server: FakeServer, visit: Callable[..., Any], tmp_path: Path, window: dict[str, Any]
) -> None:
    server.admin_key = KEY
    page = visit(tab="Adapters", **window)
    page.locator("#changes > button").wait_for(timeout=10_000)
    page.locator("#changes > button").click()
    choose(page, "change-adapter", "sentiment")
    press(page, "pin", "Enter the server's admin key first.")
    page.locator("#admin-key input").fill("wrong")
    press(page, "pin", "The server refused (401)")
    assert server.changes == []
    page.locator("#admin-key input").fill(KEY)
    press(page, "pin", "sentiment is kept in its slot.")
    page.locator("#cards .badge", has_text="pinned").wait_for()
    press(page, "unpin", "sentiment may leave its slot.")
    press(page, "rollback", "sentiment is served as a1b2c3d4e5f6.")
    page.locator("#cards .badge", has_text="rolled back").wait_for()
    # What came of it stands beside the buttons.
    told, button = (page.locator(each).first.bounding_box() for each in (".block.changed", "#fold"))
    assert 0 <= told["y"] - button["y"] < 150
    press(page, "fold", "sentiment is folded")
    page.locator("#cards a").first.wait_for(state="detached")
    page.locator("#status", has_text="nothing else answers until unfolded").wait_for(timeout=10_000)
    press(page, "unfold", "The weights are those of the base again.")
    page.locator("#delete-name textarea, #delete-name input").first.fill("sentimen")
    press(page, "delete", "Type sentiment to confirm")
    page.locator("#delete-name textarea, #delete-name input").first.fill("sentiment")
    press(page, "delete", "sentiment is deleted.")
    page.wait_for_function("document.querySelectorAll('#cards h3').length === 1")
    expect(page.locator("#change-adapter input")).to_have_value("")
    expect(page.locator("#delete-name textarea, #delete-name input").first).to_have_value("")
    assert page.locator(".toast-body").count() == 0

    files = []
    for name, content in (("adapter_config.json", "{}"), ("adapter_model.safetensors", "NaN")):
        (tmp_path / name).write_text(content)
        files.append(str(tmp_path / name))
    page.locator("#upload-files input[type=file]").set_input_files(files)
    page.locator("#upload-files", has_text="adapter_model").wait_for()
    page.locator("#upload-name textarea, #upload-name input").first.fill("new")
    press(page, "upload", "(400): new: U holds NaN")
    (tmp_path / "adapter_model.safetensors").write_text("fine")
    page.locator("#upload-files").get_by_label("Clear").first.click()
    page.locator("#upload-files input[type=file]").set_input_files(files)
    page.locator("#upload-files", has_text="adapter_model").wait_for()
    press(page, "upload", "new is served.")
    page.wait_for_function(
        "[...document.querySelectorAll('#cards h3')].some(h => h.innerText == 'new')"
    )
    body = server.changes[-1][2]
    assert b'filename="adapter_config.json"' in body and b"fine" in body

    assert scroll_width(page) <= window["width"]
    kept = page.evaluate(
        """async () => JSON.stringify({...localStorage}) + JSON.stringify({...sessionStorage}) +
        document.cookie + JSON.stringify(await indexedDB.databases()) + location.href"""
    )
    assert KEY not in kept and "history" not in kept.lower()
    assert not page.problems
    page.reload()
    page.locator("#status p.up", has_text="adapters").wait_for(timeout=20_000)
    page.problems.clear()  # Gradio aborts its stream when a page is left, and logs that.
    assert KEY not in page.content()


def test_without_the_key_a_change_that_is_forced_changes_nothing(
    server: FakeServer, visit: Callable[..., Any]
) -> None:
    """The panel is open when the server comes back without a key."""
    server.admin_key = KEY
    page = visit(tab="Adapters")
    page.locator("#changes > button").click(timeout=10_000)
    choose(page, "change-adapter", "sentiment")
    page.locator("#admin-key input").fill(KEY)
    server.admin_key = None
    press(page, "pin", "The server refused (403)")
    assert server.changes == []
    page.locator("#notice", has_text="Read-only").wait_for(timeout=10_000)
