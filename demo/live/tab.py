"""The live tab: numbers and two plots, asked for while somebody looks at them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import gradio as gr
import pandas as pd

from ..figure_table import figure_table
from ..server import Server
from .samples import History

__all__ = ["build_live", "numbers"]

QUIET: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
REDRAW_S = 2.0
SHOWN = 20
TOKENS = "vllm:generation_tokens_total"
OWN_TOKENS = "secura_adapter_generation_tokens_total"
REQUESTS = "secura_adapter_requests_total"
STATES, PLACES = "secura_adapters", "secura_places"


def build_live(server: Server) -> gr.Timer:
    """Add the tab to the page that is being built; the timer is off until the tab is open."""
    history = History(server)
    shown = gr.HTML('<p class="notice">Asking…</p>', elem_id="numbers")
    speed = gr.LinePlot(
        x="seconds ago", y="tokens/s", elem_id="speed", height=240, visible=False,
        label="Tokens per second, all models together",
    )  # fmt: skip
    traffic = gr.BarPlot(
        x="model", y="tokens", elem_id="traffic", height=300, visible=False,
        label="Tokens of each model since the start", x_label_angle=-90,
        sort="-y",
    )  # fmt: skip
    table = gr.HTML("", elem_id="traffic-table")

    async def redraw() -> list[Any]:
        await history.sample()
        now = await server.snapshot()
        rates, tokens = frames(history, now.bases)
        return [
            numbers(history, now.adapters),
            _drawn(gr.LinePlot, rates, "tokens/s", x_lim=_minutes(rates)),
            _drawn(gr.BarPlot, tokens, "tokens"),
            _table(history, now.bases),
        ]

    timer = gr.Timer(REDRAW_S, active=False)
    timer.tick(redraw, None, [shown, speed, traffic, table], **QUIET)
    return timer


def _drawn(kind: Any, rows: pd.DataFrame, y: str, **limits: Any) -> Any:
    """Return a plot from 0 to the next round number, at least 10; hidden where it has no mark.

    Empty plots have marks without a name, which screen readers stumble over. Left alone, the axis
    of nothing but zeros has ticks such as 0.000000.
    """
    most = rows[y].max()
    if not most >= 0:
        return kind(value=rows, visible=False)
    step = 10 ** math.floor(math.log10(max(most, 10.0)))
    end = float(step * math.ceil(max(most, 1.0) / step))
    return kind(value=rows, visible=True, y_lim=[0.0, end], **limits)


def _minutes(rates: pd.DataFrame) -> list[float] | None:
    """Return whole minutes, so that ticks are round."""
    if rates.empty:
        return None
    return [min(-60.0, 60.0 * math.floor(rates["seconds ago"].min() / 60)), 0.0]


def numbers(history: History, cards: Sequence[Mapping[str, Any]] = ()) -> str:
    """Return the latest numbers, or why there are none."""
    problem = history.problem
    alert = f'<p role="alert" class="error">{escape(problem)} Trying again…</p>' if problem else ""
    if not history.samples:
        return alert or '<p class="notice">Asking…</p>'
    latest = history.samples[-1]
    states, places = latest.by_label.get(STATES, {}), latest.by_label.get(PLACES, {})
    rates = history.rates(_tokens(history))
    speed = rates[-1][1] if rates and math.isfinite(rates[-1][1]) else None
    filled, held = places.get("filled", 0.0), states.get("resident")
    here = sum(card.get("state") in ("resident", "folded") for card in cards)
    items = [
        ("requests running", latest.numbers.get("vllm:num_requests_running")),
        ("requests waiting", latest.numbers.get("vllm:num_requests_waiting")),
        ("tokens/s", speed),
        ("adapters served", states.get("known")),
        ("of them in memory", here if cards else None),
        ("slots in use, versions and mixes too", None if held is None else held - filled),
        ("places in use, for full rank", filled if places else None),
        ("places free", places.get("free")),
        ("pinned", states.get("pinned")),
        ("refused", states.get("refused")),
        ("versions kept", latest.numbers.get("secura_adapter_versions")),
        ("loads into a slot so far", latest.numbers.get("secura_adapter_loads_total")),
        ("left a slot for another", latest.numbers.get("secura_adapter_evictions_total")),
        ("waiting for a place", latest.numbers.get("secura_place_requests_waiting")),
    ]
    inside = "".join(
        f"<div><dt>{what}</dt><dd>{value:.0f}</dd></div>"
        for what, value in items
        if value is not None
    )
    return f'{alert}<dl class="numbers">{inside}</dl>'


def _tokens(history: History) -> str:
    """Return the metric of tokens: vLLM's, or ours where vLLM counts none."""
    numbers = history.samples[-1].numbers if history.samples else {}
    return TOKENS if TOKENS in numbers else OWN_TOKENS


def _by_adapter(history: History) -> list[tuple[str, float, float]]:
    labels = history.samples[-1].by_label if history.samples else {}
    tokens, requests = labels.get(OWN_TOKENS, {}), labels.get(REQUESTS, {})
    names = sorted(tokens.keys() | requests.keys(), key=lambda name: -tokens.get(name, 0.0))
    return [(name, tokens.get(name, 0.0), requests.get(name, 0.0)) for name in names[:SHOWN]]


def frames(history: History, bases: Sequence[str] = ()) -> list[pd.DataFrame]:
    """Return what the two plots show: the speed over time, and the tokens of each model."""
    rates = history.rates(_tokens(history))
    rows = [(_named(name, bases), tokens) for name, tokens, _ in _by_adapter(history)]
    return [
        pd.DataFrame(rates, columns=["seconds ago", "tokens/s"], dtype=float),
        pd.DataFrame(rows, columns=["model", "tokens"]).astype({"tokens": float}),
    ]


def _named(name: str, bases: Sequence[str]) -> str:
    return f"{name} (base)" if name in bases else name


def _table(history: History, bases: Sequence[str]) -> str:
    rows = "".join(
        f"<tr><th scope=row>{escape(_named(name, bases))}</th><td>{requests:.0f}</td>"
        f"<td>{tokens:.0f}</td></tr>"
        for name, tokens, requests in _by_adapter(history)
    )
    if not rows:
        return ""
    heads = "".join(f"<th scope=col>{head}</th>" for head in ("model", "requests", "tokens"))
    return figure_table("Traffic by model", heads, rows)
