"""The chat tab's parts and what is wired to what."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gradio as gr

from ..compare import LONGEST, Settings
from .conversation import Conversation
from .display import COLUMNS, LABELS
from .handlers import Chat
from .mixer import Mixer, build_mixer
from .sharing import build_sharing

__all__ = ["ChatTab", "build_chat"]

QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
HINT = (
    "The same prompt goes to every column: the base, adapters on it, or mixes of them. "
    "Take an example below, or write your own."
)


@dataclass
class ChatTab:
    """The parts that the page fills: from the server, or from a link."""

    columns: gr.Radio
    boxes: list[gr.Column]
    models: list[gr.Dropdown]
    prompt: gr.Textbox
    system: gr.Textbox
    settings: list[Any]
    examples: gr.Dataset
    mixer: Mixer


def build_chat(chat: Chat) -> ChatTab:
    """Add the tab to the page that is being built."""
    conversations = gr.State([Conversation() for _ in range(COLUMNS)])
    with gr.Row(elem_id="bar"):
        columns = gr.Radio(
            list(range(1, COLUMNS + 1)),
            value=2,
            label="Columns",
            elem_id="count",
            scale=1,
            min_width=260,
        )
        marked = gr.Checkbox(
            True,
            label="Show how answers differ from column 1",
            elem_id="marked",
            scale=3,
            min_width=300,
        )
    boxes, models, bots, lines, marks = [], [], [], [], []
    with gr.Row(elem_id="columns", equal_height=False):
        for i in range(COLUMNS):
            with gr.Column(visible=i < 2, min_width=270, elem_id=f"column-{i + 1}") as box:
                models.append(
                    gr.Dropdown(
                        [],
                        label=f"Model {i + 1}",
                        allow_custom_value=True,
                        container=False,
                        elem_id=f"model-{i + 1}",
                    )
                )
                bots.append(
                    gr.Chatbot(
                        label=f"Column {i + 1}",
                        elem_id=f"chat-{i + 1}",
                        height="var(--chat)",
                        editable="user",
                        sanitize_html=True,
                        allow_tags=False,
                        latex_delimiters=[],
                        buttons=["copy"],
                        allow_file_downloads=False,
                        placeholder=HINT,
                    )
                )
                lines.append(gr.HTML("", elem_id=f"figures-{i + 1}"))
                if i:
                    marks.append(
                        gr.HighlightedText(
                            label="Difference to column 1",
                            color_map=LABELS,
                            show_legend=True,
                            show_inline_category=False,
                            visible=False,
                            elem_id=f"difference-{i + 1}",
                        )
                    )
            boxes.append(box)
    with gr.Row(elem_id="panels"):
        with gr.Accordion("System prompt and sampling", open=False, elem_id="settings"):
            system = gr.Textbox("", label="System prompt", elem_id="system", max_lines=8)
            settings = _sampling()
        mixer = build_mixer(columns, models)
        share = build_sharing(chat.server)
    with gr.Column(elem_id="dock"):
        examples = gr.Dataset(
            components=[
                gr.Textbox(visible=False, label=each) for each in ("name", "system", "prompt")
            ],
            samples=[],
            sample_labels=[],
            label="Examples",
            elem_id="examples",
            samples_per_page=40,
        )
        with gr.Row(elem_id="ask"):
            prompt = gr.Textbox(
                "",
                label="Prompt",
                placeholder="Ask every column (Enter sends, Esc stops)",
                container=False,
                elem_id="prompt",
                max_lines=8,
                scale=8,
                min_width=260,
            )
            send = gr.Button("Send", elem_id="send", variant="primary", scale=1, min_width=76)
            stop = gr.Button("Stop", elem_id="stop", interactive=False, scale=1, min_width=76)
            again = gr.Button("Retry", elem_id="retry", scale=1, min_width=76)
            clear = gr.Button("Clear", elem_id="clear", scale=1, min_width=76)
    share.follow(prompt, conversations, columns, system, settings, models)

    state = [conversations, columns, marked, system, *settings, *models]
    shown = [prompt, send, stop, *bots, *lines, *marks]
    running: dict[str, Any] = {**QUIET, "concurrency_limit": None, "trigger_mode": "once"}
    asking = [
        gr.on([send.click, prompt.submit], chat.send, [prompt, *state], shown, **running),
        again.click(chat.retry, state, shown, **running),
    ]
    stop.click(chat.stop, queue=False, **QUIET)
    clear.click(chat.clear, [conversations], shown, queue=False, **QUIET)
    marked.change(chat.mark, [conversations, columns, marked], marks, queue=False, **QUIET)
    for i, bot in enumerate(bots):
        asking.append(bot.retry(chat.retry_one(i), state, shown, **running))
        asking.append(bot.edit(chat.edit(i), state, shown, **running))
        bot.clear(chat.clear_one(i), [conversations], shown, queue=False, **QUIET)
    for event in asking:
        event.then(chat.ended, None, [send, stop], queue=False, **QUIET)
    # One for each of the two events, which come in any order.
    before, last = gr.State(2), gr.State(2)
    columns.change(
        _shown,
        [columns, last, mixer.target],
        [last, *boxes, mixer.target],
        queue=False,
        **QUIET,
    )
    columns.input(
        chat.models_for_more, [columns, before, *models], [before, *models], queue=False, **QUIET
    )
    return ChatTab(columns, boxes, models, prompt, system, settings, examples, mixer)


def _shown(count: int, last: int, target: int) -> list[Any]:
    """Show so many columns, and let a mix be written into those."""
    if count == last:
        return [gr.skip()] * (COLUMNS + 2)
    changed = range(min(count, last), max(count, last))
    boxes = [gr.update(visible=i < count) if i in changed else gr.skip() for i in range(COLUMNS)]
    choices = list(range(1, count + 1))
    return [count, *boxes, gr.update(choices=choices, value=min(target or count, count))]


def _sampling() -> list[Any]:
    usual = Settings()
    with gr.Row():
        return [
            gr.Slider(
                1, LONGEST, usual.max_tokens, step=1, label="Max tokens", elem_id="max-tokens"
            ),
            gr.Slider(
                0, 2, usual.temperature, step=0.05, label="Temperature", elem_id="temperature"
            ),
            gr.Slider(0.05, 1, usual.top_p, step=0.05, label="Top p", elem_id="top-p"),
            gr.Number(usual.seed, label="Seed", precision=0, elem_id="seed"),
        ]
