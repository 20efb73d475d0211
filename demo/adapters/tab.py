"""The adapters tab: a gallery for everyone, changes for whoever has the server's admin key."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
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
UPLOAD = (
    '<p class="notice">A new adapter, or a new version: <code>adapter_config.json</code> and '
    "<code>adapter_model.safetensors</code>, and what its card is made of: <code>README.md</code>, "
    "<code>train.json</code>.</p>"
)
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


def _result() -> gr.HTML:
    """Add the place beside some buttons where it is told what came of them."""
    return gr.HTML("", elem_classes="changed")


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
            # What was chosen may be gone a moment later, and Gradio makes an error of that.
            chosen = gr.Dropdown(
                [], label="Adapter", allow_custom_value=True, elem_id="change-adapter"
            )
            version = gr.Dropdown(
                [],
                label="Version to go back to",
                allow_custom_value=True,
                elem_id="change-version",
            )
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
        changed = _result()
        with gr.Row():
            typed = gr.Textbox(
                "", label="To delete the adapter, type its name", elem_id="delete-name", scale=3
            )
            delete = gr.Button(
                "Delete", elem_id="delete", variant="stop", size="sm", scale=1, min_width=90
            )
        deleted = _result()
        gr.HTML(UPLOAD)
        files = gr.File(
            label="New adapter", file_count="multiple", elem_id="upload-files", height=220
        )
        with gr.Row():
            name = gr.Textbox("", label="Name of the new adapter", elem_id="upload-name", scale=3)
            upload = gr.Button("Upload", elem_id="upload", size="sm", scale=1, min_width=90)
        uploaded = _result()
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

    results = [changed, deleted, uploaded]

    def change(
        work: Callable[..., Awaitable[str]], where: gr.HTML, fields: Sequence[Any]
    ) -> Callable[..., Awaitable[list[Any]]]:
        """Return a handler: do it, say what came of it there, and show the adapters as they are
        now; what was done leaves its fields empty."""

        skipped = [gr.skip()] * (2 + len(fields))

        async def handler(text: str, which: str, kept: str | None, *values: Any) -> list[Any]:
            try:
                outcome = said(await work(*values))
            except Refused as refused:
                told = said(str(refused), failed=True)
                return [*(told if each is where else "" for each in results), *skipped]
            snapshot = await server.snapshot(fresh=True)
            found = matching(snapshot.adapters, text, which)
            names = [card["id"] for card in snapshot.adapters]
            shown = gallery(found, snapshot.bases, len(snapshot.adapters))
            left = gr.update(choices=names, value=kept if kept in names else None)
            told = [outcome if each is where else "" for each in results]
            return [*told, shown, left, *[gr.update(value=None)] * len(fields)]

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

    works: list[tuple[gr.Button, Callable[..., Awaitable[str]], list[Any], gr.HTML, list[Any]]] = [
        (pin, lambda k, a: server.pin(k, named(a), True), [key, chosen], changed, []),
        (unpin, lambda k, a: server.pin(k, named(a), False), [key, chosen], changed, []),
        (back, do_rollback, [key, chosen, version], changed, []),
        (fold, lambda k, a: server.fold(k, named(a)), [key, chosen], changed, []),
        (unfold, lambda k: server.fold(k, None), [key], changed, []),
        (delete, do_delete, [key, chosen, typed], deleted, [typed]),
        (upload, do_upload, [key, name, files], uploaded, [name, files]),
    ]
    for button, work, inputs, where, fields in works:
        given, shown = [search, wanted, chosen, *inputs], [*results, cards, chosen, *fields]
        button.click(change(work, where, fields), given, shown, **FREE).then(
            versions_of, [chosen], [version], **FREE
        )
    chosen.change(versions_of, [chosen], [version], **FREE)
    gr.on([search.change, wanted.change], find, [search, wanted], [cards], queue=False, **QUIET)
    return tab
