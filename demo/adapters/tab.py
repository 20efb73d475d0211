"""The adapters tab: a gallery for everyone, changes for whoever has the server's admin key."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from ..server import Refused, Server, Snapshot
from .card import gallery
from .search import ALL, FILTERS, matching

__all__ = ["AdaptersTab", "build_adapters", "notice"]

QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
FREE: dict[str, Any] = {**QUIET, "concurrency_limit": None}
READ_ONLY = (
    "Read-only: this server takes no changes through a page. Its operator can start it with an "
    "admin key (--admin-api-key), which is then asked for here."
)
WITH_KEY = "Changes need the server's admin key. It is sent with each change, and kept nowhere."
NO_CARDS = "This server has no list of adapters: it is not secura-serve, or not reached."


@dataclass
class AdaptersTab:
    search: gr.Textbox
    wanted: gr.Dropdown
    notice: gr.HTML
    cards: gr.HTML
    changes: gr.Accordion
    chosen: gr.Dropdown


def notice(snapshot: Snapshot) -> str:
    """Return who may change the server through this page."""
    if not snapshot.adapters:
        text = snapshot.problem or NO_CARDS
    else:
        text = WITH_KEY if snapshot.operator == "key" else READ_ONLY
    return f'<p class="notice">{escape(text)}</p>'


def said(text: str, *, failed: bool = False) -> str:
    role, name = ("alert", "error") if failed else ("status", "done")
    return f'<p role="{role}" class="{name}">{escape(text)}</p>'


def build_adapters(server: Server) -> AdaptersTab:
    """Add the tab to the page that is being built."""
    about = gr.HTML("", elem_id="notice")
    with gr.Row():
        search = gr.Textbox("", label="Search name, task, kind, digest", elem_id="search", scale=3)
        wanted = gr.Dropdown(
            list(FILTERS), value=ALL, label="Show", elem_id="filter", scale=1, min_width=150
        )
    with gr.Accordion("Change", open=False, visible=False, elem_id="changes") as changes:
        key = gr.Textbox(
            "",
            label="Admin key",
            type="password",
            elem_id="admin-key",
            html_attributes=gr.InputHTMLAttributes(autocomplete="off"),
        )
        with gr.Row():
            chosen = gr.Dropdown([], label="Adapter", elem_id="change-adapter")
            version = gr.Dropdown([], label="Version to go back to", elem_id="change-version")
        with gr.Row():
            pin, unpin, back, fold, unfold = (
                gr.Button(label, elem_id=name, size="sm", min_width=90)
                for label, name in (
                    ("Pin", "pin"),
                    ("Unpin", "unpin"),
                    ("Roll back", "rollback"),
                    ("Fold", "fold"),
                    ("Unfold", "unfold"),
                )
            )
        with gr.Row():
            typed = gr.Textbox(
                "", label="To delete the adapter, type its name", elem_id="delete-name", scale=3
            )
            delete = gr.Button(
                "Delete", elem_id="delete", variant="stop", size="sm", scale=1, min_width=90
            )
        files = gr.File(
            label="adapter_config.json, adapter_model.safetensors, README.md, train.json",
            file_count="multiple",
            elem_id="upload-files",
            height=140,
        )
        with gr.Row():
            name = gr.Textbox("", label="Name of the new adapter", elem_id="upload-name", scale=3)
            upload = gr.Button("Upload", elem_id="upload", size="sm", scale=1, min_width=90)
        result = gr.HTML("", elem_id="changed")
    cards = gr.HTML("", elem_id="cards")
    tab = AdaptersTab(search, wanted, about, cards, changes, chosen)

    async def find(text: str, which: str) -> str:
        snapshot = await server.snapshot()
        return gallery(
            matching(snapshot.adapters, text, which), snapshot.bases, len(snapshot.adapters)
        )

    async def versions_of(adapter: str | None) -> Any:
        card = (await server.snapshot()).card(adapter) or {}
        older = [v["digest"] for v in card.get("versions", []) if v["digest"] != card.get("digest")]
        choices = [(digest[:12], digest) for digest in older]
        return gr.update(choices=choices, value=older[-1] if older else None)

    def change(work: Callable[..., Awaitable[str]]) -> Callable[..., Awaitable[list[Any]]]:
        """Return a handler: do it, say what came of it, and show the adapters as they are now."""

        async def handler(text: str, which: str, kept: str | None, *values: Any) -> list[Any]:
            try:
                outcome = said(await work(*values))
            except Refused as refused:
                return [said(str(refused), failed=True), gr.skip(), gr.skip()]
            snapshot = await server.snapshot(fresh=True)
            found = matching(snapshot.adapters, text, which)
            names = [card["id"] for card in snapshot.adapters]
            shown = gallery(found, snapshot.bases, len(snapshot.adapters))
            # Gradio refuses the next change if what it deleted stays chosen.
            left = gr.update(choices=names, value=kept if kept in names else None)
            return [outcome, shown, left]

        return handler

    def named(adapter: str | None) -> str:
        if not adapter:
            raise Refused("Choose an adapter first.")
        return adapter

    async def do_rollback(secret: str, adapter: str | None, digest: str | None) -> str:
        if not digest:
            raise Refused("Choose a version: this adapter has no other, or none is chosen.")
        return await server.rollback(secret, named(adapter), digest)

    async def do_delete(secret: str, adapter: str | None, confirmed: str) -> str:
        if confirmed != named(adapter):
            raise Refused(f"Type {adapter} to confirm that it is to be deleted.")
        return await server.delete(secret, named(adapter))

    async def do_upload(secret: str, called: str, paths: list[str] | None) -> str:
        if not called.strip() or not paths:
            raise Refused("An upload needs a name and the adapter's files.")
        return await server.upload(secret, called.strip(), [Path(path) for path in paths])

    works: list[tuple[gr.Button, Callable[..., Awaitable[str]], list[Any]]] = [
        (pin, lambda k, a: server.pin(k, named(a), True), [key, chosen]),
        (unpin, lambda k, a: server.pin(k, named(a), False), [key, chosen]),
        (back, do_rollback, [key, chosen, version]),
        (fold, lambda k, a: server.fold(k, named(a)), [key, chosen]),
        (unfold, lambda k: server.fold(k, None), [key]),
        (delete, do_delete, [key, chosen, typed]),
        (upload, do_upload, [key, name, files]),
    ]
    for button, work, inputs in works:
        given = [search, wanted, chosen, *inputs]
        button.click(change(work), given, [result, cards, chosen], **FREE).then(
            versions_of, [chosen], [version], **FREE
        )
    chosen.change(versions_of, [chosen], [version], **FREE)
    gr.on([search.change, wanted.change], find, [search, wanted], [cards], queue=False, **QUIET)
    return tab
