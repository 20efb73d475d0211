"""The panel that gives a comparison away: as a link, a command, a program."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from ..answer import Answer
from ..compare import Settings
from ..server import Server
from .conversation import Conversation, Turn
from .display import COLUMNS
from .share import Shared, as_curl, as_python, to_query

__all__ = ["Sharing", "build_sharing"]

QUIET: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
# The browser knows under which address the page is open; this process may stand behind a proxy.
LINK = "(query) => [query && window.location.origin + window.location.pathname + '?' + query]"
# A server reads at most 64 KiB of address and headers.
LONGEST_LINK = 50_000


@dataclass
class Sharing:
    """The panel's parts; `follow` wires them to what they tell."""

    server: Server
    button: gr.Button
    query: gr.Textbox
    link: gr.Textbox
    curl: gr.Textbox
    python: gr.Textbox

    def follow(
        self,
        prompt: gr.Textbox,
        conversations: gr.State,
        columns: gr.Radio,
        system: gr.Textbox,
        settings: Sequence[Any],
        models: Sequence[gr.Dropdown],
    ) -> None:
        """Write what these parts hold when the button is pressed."""

        def write(
            text: str, kept: list[Conversation], count: int, said: str, *values: Any
        ) -> list[str]:
            limit, heat, top, seed = values[:-COLUMNS]
            seed = None if seed is None else int(seed)
            chosen = Settings(int(limit), heat, top, seed).within_limits()
            asked = [(n.strip(), kept[i]) for i, n in enumerate(values[-COLUMNS:][:count]) if n]
            latest = text.strip() or next((c.turns[-1].prompt for c in kept if c.turns), "")
            shared = Shared(tuple(name for name, _ in asked), latest, said.strip(), chosen)
            asks = []
            for name, conversation in asked:
                turns = conversation.turns
                if text.strip() or not turns:
                    turns = [*turns, Turn(latest, Answer(name))]
                asks.append((name, Conversation(turns).messages(said.strip())))
            endpoint, query = self.server.endpoint, to_query(shared)
            if len(query) > LONGEST_LINK:
                gr.Warning("The prompt is too long for a link: only the commands have it.")
            return [
                query if len(query) <= LONGEST_LINK else "",
                as_curl(endpoint, asks, chosen),
                as_python(endpoint, asks, chosen),
            ]

        self.button.click(
            write,
            [prompt, conversations, columns, system, *settings, *models],
            [self.query, self.curl, self.python],
            **QUIET,
        ).then(None, [self.query], [self.link], js=LINK, **QUIET)


def build_sharing(server: Server) -> Sharing:
    """Add the panel to the page that is being built."""
    with gr.Accordion("Share", open=False, elem_id="share"):
        made = gr.Button("Write link, curl and Python", elem_id="share-write", size="sm")
        query = gr.Textbox(visible="hidden", label="query")
        link, curl, python = (
            gr.Textbox(
                label=label, buttons=["copy"], interactive=False, lines=1, max_lines=8, elem_id=name
            )
            for label, name in (
                ("Link", "share-link"),
                ("curl", "share-curl"),
                ("Python", "share-python"),
            )
        )
    return Sharing(server, made, query, link, curl, python)
