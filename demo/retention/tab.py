"""The retention tab: its numbers, its pictures, and questions asked live."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from html import escape
from typing import Any

import gradio as gr
import pandas as pd

from ..adapters.card import main_score
from ..adapters.words import number
from ..answer import Answer
from ..compare import Comparison, Settings
from ..figure_table import figure_table
from ..server import Refused, Server, Snapshot
from .layers import layer_table
from .questions import QUESTIONS, table
from .results import Results, heat_table

__all__ = ["RetentionTab", "build_retention", "front", "kept", "named"]

QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
REDRAW_S = 0.4
FARTHEST = 0.5
SETTINGS = Settings(max_tokens=32)
THIS, SERVED, EXPERIMENT = "this adapter", "others of its task", "experiment"
# Each keeps a contrast of 3 to 1 on the light page and on the dark one.
COLORS = {THIS: "#ef4444", SERVED: "#6366f1", EXPERIMENT: "#7c8aa0"}
X = "KL to the base, as a power of ten"
MEANING = {
    "kl": "KL to the base per token of neutral text: 0 is unchanged",
    "perplexity_ratio": "perplexity of neutral text over the base's: 1 is unchanged",
    "unchanged": "share of general questions answered in the base's words",
    "still_right": "share of the base's right answers that stay right",
}


@dataclass
class RetentionTab:
    chosen: gr.Dropdown


def build_retention(server: Server, results: Results) -> RetentionTab:
    """Add the tab to the page that is being built."""
    chosen = gr.Dropdown([], label="Adapter", allow_custom_value=True, elem_id="kept-adapter")
    numbers = gr.HTML(kept(None), elem_id="kept")
    picture = gr.ScatterPlot(
        # Not before there is something to draw: two drawings at once may end in the wrong order.
        visible=False,
        x=X,
        y="score",
        color="what",
        color_map=COLORS,
        tooltip="all",
        elem_id="front",
        height=400,
        label="Score against KL to the base, of one task: left and high is better. −2 is a KL of "
        ".01, −1 of .1",
    )
    names = gr.HTML("", elem_id="front-names")
    with gr.Row():
        ask = gr.Button("Ask base and adapter", elem_id="ask-questions", variant="primary")
        stop = gr.Button("Stop", elem_id="stop-questions", min_width=90)
        measure = gr.Button("Show the change of each layer", elem_id="show-layers")
    answers = gr.HTML("", elem_id="questions")
    layers = gr.HTML("", elem_id="layers")
    for matrix in results.matrices:
        gr.HTML(heat_table(matrix), elem_classes="matrix")
    running: dict[str | None, Comparison] = {}

    async def show(name: str | None) -> list[Any]:
        now = await server.snapshot()
        points = front(now, name, results)
        drawn = gr.skip()
        if not points.empty:
            # Limits of their own, since Gradio's begin at 0. No tick stands at the very edge, where
            # its label would be moved onto the next.
            left, right = points[X].min(), points[X].max()
            x_lim = [math.floor(2 * left) / 2 - 0.07, math.ceil(2 * right) / 2 + 0.07]
            lowest = math.floor(10 * points["score"].min() - 0.1) / 10
            y_lim = [lowest, max(1.0, points["score"].max())]
            drawn = gr.ScatterPlot(value=points, visible=True, x_lim=x_lim, y_lim=y_lim)
        return [kept(now.card(name)), drawn, named(points), "", ""]

    async def questions(request: gr.Request, name: str | None) -> AsyncIterator[str]:
        now = await server.snapshot()
        if not name or not now.bases or name not in now.served:
            text = now.problem or "Choose an adapter that can be asked now."
            yield f'<p role="alert" class="error">{escape(text)}</p>'
            return
        if request.session_hash in running:
            return
        base, adapter = ([Answer(model) for _ in QUESTIONS] for model in (now.bases[0], name))
        asked = [[{"role": "user", "content": question}] for question, _ in QUESTIONS]
        asks = [*zip(base, asked, strict=True), *zip(adapter, asked, strict=True)]
        comparison = Comparison(server.answers, asks, SETTINGS)
        running[request.session_hash] = comparison
        try:
            yield table(base, adapter)
            at = time.monotonic()
            async for _ in comparison:
                await asyncio.sleep(max(0.0, at + REDRAW_S - time.monotonic()))
                at = time.monotonic()
                yield table(base, adapter)
            yield table(base, adapter)
        finally:
            comparison.stop()
            running.pop(request.session_hash, None)

    async def changes(name: str | None) -> AsyncIterator[str]:
        if not name:
            yield '<p role="alert" class="error">Choose an adapter.</p>'
            return
        yield '<p class="notice" role="status">The server compares every weight…</p>'
        try:
            yield layer_table(name, await server.changes(name))
        except Refused as refused:
            yield f'<p role="alert" class="error">{escape(str(refused))}</p>'

    async def end(request: gr.Request) -> None:
        if comparison := running.get(request.session_hash):
            comparison.stop()

    measured = measure.click(changes, [chosen], [layers], concurrency_limit=None, **QUIET)
    # What an earlier choice still waits for must not come behind this one.
    away = chosen.change(
        # What is on the page is drawn once for its points and once for its limits, and the drawing
        # that ends last stays.
        lambda: gr.ScatterPlot(visible=False),
        None,
        [picture],
        queue=False,
        cancels=[measured],
        **QUIET,
    )
    away.then(show, [chosen], [numbers, picture, names, answers, layers], queue=False, **QUIET)
    ask.click(questions, [chosen], [answers], concurrency_limit=None, trigger_mode="once", **QUIET)
    stop.click(end, queue=False, **QUIET)
    return RetentionTab(chosen)


def kept(card: Any) -> str:
    """Return what a card says of score and retention, as large numbers."""
    if card is None:
        return '<p class="notice">Choose an adapter.</p>'
    items = []
    if (best := main_score(card)) is not None:
        base = f", base {number(best[2])}" if best[2] is not None else ""
        items.append((f"{best[0].replace('_', ' ')}{base}", number(best[1])))
    for name, value in (card.get("retention") or {}).items():
        items.append((MEANING.get(name, name.replace("_", " ")), number(value)))
    if not items:
        return '<p class="notice">Its card has no numbers.</p>'
    inside = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in items)
    return f'<dl class="numbers">{inside}</dl>'


def front(now: Snapshot, name: str | None, results: Results) -> pd.DataFrame:
    """Return a row for each adapter of the same task whose card has both numbers, and each variant.

    Adapters have the same task if the base has the same score in it.
    """
    group = _task(now.card(name))
    same = [card for card in now.adapters if _task(card) == group]
    tasks = [None, *(card["id"] for card in same)]
    rows = [(p.name, p.kl, p.score, EXPERIMENT) for p in results.points if p.task in tasks]
    for card in same:
        kl, best = (card.get("retention") or {}).get("kl"), main_score(card)
        if kl is not None and best is not None:
            rows.append((card["id"], kl, best[1], THIS if card["id"] == name else SERVED))
    # Beyond, a model says little, and would press all others against the axis.
    rows = [row for row in rows if 0 < row[1] <= FARTHEST]
    rows.sort(key=lambda row: row[-1] == THIS)  # Drawn last, it lies on top.
    frame = pd.DataFrame(rows, columns=["name", "KL", "score", "what"])
    frame = frame.astype({"KL": float, "score": float})
    frame[X] = frame["KL"].map(math.log10)
    return frame


def _task(card: Any) -> tuple[Any, ...] | None:
    best = main_score(card) if card is not None else None
    return best and (best[0], best[2])


def named(points: pd.DataFrame) -> str:
    """Return the points of the picture with their names, from the least KL on."""
    rows = "".join(
        f"<tr><th scope=row>{escape(str(row['name']))}</th><td>{number(row['score'])}</td>"
        f"<td>{number(row['KL'])}</td><td>{escape(str(row['what']))}</td></tr>"
        for _, row in points.sort_values("KL").iterrows()
    )
    if not rows:
        return ""
    heads = "".join(f"<th scope=col>{head}</th>" for head in ("name", "score", "KL", "what"))
    listed = figure_table("Points of the picture", heads, rows)
    return f"<details><summary>Points by name ({len(points)})</summary>{listed}</details>"
