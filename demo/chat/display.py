"""What the columns show: one list of updates for prompt, buttons, chats, figures, differences."""

from __future__ import annotations

from html import escape
from typing import Any

import gradio as gr

from ..answer import Answer, summary
from .conversation import Conversation
from .difference import ADDED, MISSING, difference

__all__ = ["COLUMNS", "LABELS", "buttons", "differences", "figures", "nothing", "redrawn", "step"]

COLUMNS = 4
TIMES = (
    "Measured where this page reads the stream. The time to the first token includes the wait for "
    "the server, which answers the other columns too."
)
LABELS = {ADDED: "#bbf7d0", MISSING: "#fecaca"}


def figures(answer: Answer) -> str:
    """Return the line below an answer: its speed, and how it ended where that is not plain."""
    text = summary(answer) if answer.tokens or answer.state in ("done", "stopped") else ""
    if not answer.finished and not text:
        text = "waiting"
    ended = "stopped" if answer.state == "stopped" else ""
    if answer.error is not None:
        # The reason stands where the answer would.
        ended = "broke off" if answer.text else "no answer"
    role = ' role="alert" class="error"' if answer.error else ""
    said = " | ".join(filter(None, [text, ended]))
    return (
        f'<div class="figures" data-state="{answer.state}"><p title="{TIMES}"{role}>'
        f"<b>{escape(answer.model)}</b> {escape(said)}</p></div>"
    )


def step(
    conversations: list[Conversation],
    answers: dict[int, Answer],
    drawn: dict[int, tuple[Any, ...]],
) -> list[Any]:
    """Return prompt, buttons, chats, figures and differences; what has not changed is skipped."""
    bots: list[Any] = [gr.skip()] * COLUMNS
    lines: list[Any] = [gr.skip()] * COLUMNS
    first = not drawn
    for i, answer in answers.items():
        # The chat may have been cleared meanwhile.
        asked = any(turn.answer is answer for turn in conversations[i].turns[-1:])
        state = (asked, len(answer.text), answer.tokens, answer.state)
        if drawn.get(i) != state:
            bots[i], drawn[i] = conversations[i].shown(), state
            lines[i] = figures(answer) if asked else ""
    prompt = gr.update(value="") if first else gr.skip()
    shown = buttons(running=True) if first else [gr.skip(), gr.skip()]
    hide = [gr.update(visible=False) if first else gr.skip() for _ in range(COLUMNS - 1)]
    return [prompt, *shown, *bots, *lines, *hide]


def buttons(*, running: bool) -> list[Any]:
    """Return Send and Stop, of which one can be pressed."""
    return [gr.update(interactive=not running), gr.update(interactive=running)]


def nothing() -> list[Any]:
    """Change nothing."""
    return [gr.skip()] * (3 * COLUMNS + 2)


def redrawn(conversations: list[Conversation]) -> list[Any]:
    """Return what the columns show anew; prompt and buttons stay."""
    lasts = [conversation.turns[-1:] for conversation in conversations]
    lines = [figures(last[0].answer) if last else "" for last in lasts]
    bots = [conversation.shown() for conversation in conversations]
    hidden = [gr.update(visible=False)] * (COLUMNS - 1)
    return [gr.skip(), gr.skip(), gr.skip(), *bots, *lines, *hidden]


def differences(conversations: list[Conversation], columns: int) -> list[Any]:
    """Return how the last answers of the first `columns` columns differ from the first one's."""
    lasts = [turns[-1].answer.text if (turns := c.turns) else "" for c in conversations]
    return [
        gr.update(
            value=difference(lasts[0], lasts[i]),
            visible=bool(i < columns and lasts[0] and lasts[i]),
        )
        for i in range(1, COLUMNS)
    ]
