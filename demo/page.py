"""The whole page: its tabs, and what keeps them up to date with the server."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from typing import Any

import gradio as gr

from .adapters.card import gallery
from .adapters.search import matching
from .adapters.tab import build_adapters, notice
from .chat.display import COLUMNS
from .chat.handlers import Chat
from .chat.share import from_query
from .chat.tab import build_chat
from .examples import ANY, Examples
from .live.tab import build_live
from .retention.results import Results
from .retention.tab import build_retention
from .server import Server, Snapshot

__all__ = ["build", "examples_of", "mixable", "status"]

POLL_S = 3.0
TO_PROMPT = "() => document.querySelector('#prompt textarea').focus({preventScroll: true})"
QUIET: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}


def build(server: Server, examples: Examples, results: Results) -> gr.Blocks:
    """Return the page of one server."""
    # Uploads are files of this process: those of an hour ago are deleted every ten minutes.
    with gr.Blocks(
        title="secura-serve",
        analytics_enabled=False,
        fill_width=True,
        delete_cache=(600, 3600),
    ) as blocks:
        seen = gr.State(None)
        with gr.Row(elem_id="head"):
            gr.HTML("<h1>secura-serve</h1>", elem_id="title", min_width=150)
            line = gr.HTML(
                status("asking the server…", up=True), elem_id="status", min_width=260, scale=4
            )
        with gr.Tabs(elem_id="tabs"):
            with gr.Tab("Chat", id="chat") as first:
                chat = build_chat(Chat(server))
            with gr.Tab("Adapters", id="adapters") as second:
                shelf = build_adapters(server)
            with gr.Tab("Retention", id="retention") as third:
                retention = build_retention(server, results)
            with gr.Tab("Live", id="live") as fourth:
                live = build_live(server)
        for tab in (first, second, third, fourth):
            tab.select(_switch(tab is fourth), None, [live], **QUIET)

        follows = [
            seen, line, *chat.models, chat.examples, chat.mixer.parts,
            shelf.notice, shelf.cards, shelf.changes, shelf.chosen, retention.chosen,
        ]  # fmt: skip

        async def follow(
            last: Snapshot | None,
            text: str,
            which: str,
            changing: str | None,
            kept: str | None,
            *models: str | None,
        ) -> list[Any]:
            """Show what the server offers, where that has changed."""
            now = await server.snapshot()
            if now == last:
                return [gr.skip()] * len(follows)
            if now.problem is not None:
                # The last known models stay: the server may be back in a moment.
                absent = Snapshot(problem=now.problem)
                rest = [gr.skip()] * (len(follows) - 2)
                return [absent, status(f"{now.problem} Trying again…", up=False), *rest]
            names = [card["id"] for card in now.adapters]
            return [
                now,
                status(_offer(now, server.endpoint), up=True),
                *_model_updates(now, models),
                _example_updates(examples_of(now, examples)),
                gr.update(choices=mixable(now)),
                notice(now),
                gallery(matching(now.adapters, text, which), now.bases, len(now.adapters)),
                gr.update(visible=now.operator == "key"),
                gr.update(choices=names, **({} if changing in [None, *names] else {"value": None})),
                gr.update(choices=names, value=kept if kept in names else next(iter(names), None)),
            ]

        def shared(request: gr.Request, *usual: Any) -> list[Any]:
            """Fill in what a link carries."""
            link = from_query(dict(request.query_params), COLUMNS)
            if link is None:
                return [gr.skip()] * (COLUMNS + len(usual) + 3)
            names = [*link.models, *[gr.skip()] * (COLUMNS - len(link.models))]
            chosen = link.settings
            sampling = [chosen.max_tokens, chosen.temperature, chosen.top_p, chosen.seed]
            count = len(link.models) or gr.skip()
            return [count, link.prompt, link.system, *sampling, *names]

        asked = [
            seen, shelf.search, shelf.wanted, shelf.chosen, retention.chosen, *chat.models,
        ]  # fmt: skip
        gr.on(
            [blocks.load],
            shared,
            chat.settings,
            [chat.columns, chat.prompt, chat.system, *chat.settings, *chat.models],
            **QUIET,
        ).then(follow, asked, follows, **QUIET)
        gr.Timer(POLL_S).tick(follow, asked, follows, **QUIET)
        chat.examples.click(
            pick, [chat.examples, seen], [chat.system, chat.prompt, *chat.models[:2]], **QUIET
        ).then(None, js=TO_PROMPT, **QUIET)
    return blocks


def _switch(active: bool) -> Callable[[], Any]:
    return lambda: gr.update(active=active)


def status(text: str, up: bool) -> str:
    return f'<p class="{"up" if up else "down"}" role="status">{escape(text)}</p>'


def _offer(now: Snapshot, endpoint: str) -> str:
    count = f"{len(now.served)} adapter{'' if len(now.served) == 1 else 's'}"
    said = f"{', '.join(now.bases)} and {count}"
    if now.folded is not None:
        name, base = now.folded.id, now.folded.parent
        said = f"{name}, folded into {base}: nothing else answers until unfolded,"
    return f"{said} at {endpoint}"


def _model_updates(now: Snapshot, models: Sequence[str | None]) -> list[Any]:
    """Return the choices of all columns, and a model for the columns that have none."""
    choices = [(f"{name} (base)", name) for name in now.bases]
    for name in now.served:
        choices.append((name, name))
        card = now.card(name) or {}
        versions = [each["digest"] for each in card.get("versions", [])]
        choices += [(f"{name}@{d[:12]}", f"{name}@{d[:12]}") for d in versions if len(versions) > 1]
    usual = [*now.bases[:1], *now.served] or [""]
    # A column that has none gets one that no other has, while there are any.
    free = [name for name in usual if name not in models]
    given = [model or (free.pop(0) if free else usual[-1]) for model in models]
    return [
        gr.update(choices=choices) if model else gr.update(choices=choices, value=name or None)
        for model, name in zip(models, given, strict=True)
    ]


def mixable(now: Snapshot) -> list[str]:
    """Return the adapters of which a sum can be asked, those with a norm behind the others: the
    two kinds are not mixed with each other."""
    parts = [c for c in now.adapters if c["id"] in now.served and c.get("type") == "cur"]
    return [c["id"] for c in sorted(parts, key=lambda c: c.get("magnorm") not in (None, "none"))]


def examples_of(now: Snapshot, given: Examples) -> list[tuple[str, str, str]]:
    """Return name, system prompt and prompt of every example: the given ones, then the cards'."""
    rows = [
        (name, example.get("system", ""), example["prompt"])
        for name, examples in given.items()
        if name == ANY or name in now.served
        for example in examples
    ]
    prompts = {(name, prompt) for name, _, prompt in rows}
    for card in now.adapters:
        for prompt in card.get("examples") or []:
            if card["id"] in now.served and (card["id"], prompt) not in prompts:
                rows.append((card["id"], "", str(prompt)))
    return rows


def _example_updates(rows: Sequence[tuple[str, str, str]]) -> Any:
    labels = [f"{name} · {prompt}" if name else prompt for name, _, prompt in rows]
    return gr.Dataset(samples=[list(row) for row in rows], sample_labels=labels, visible=bool(rows))


def pick(row: list[str], now: Snapshot | None) -> list[Any]:
    """Return system prompt, prompt and the first two models of the example that was clicked."""
    name, system, prompt = row
    if not name or now is None:
        return [system, prompt, gr.skip(), gr.skip()]
    return [system, prompt, *(now.bases[:1] or [gr.skip()]), name]
