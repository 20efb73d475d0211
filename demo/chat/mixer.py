"""Sliders that write the expression of a mix into a column's model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from .mix import LIMIT, expression, parts_of

__all__ = ["Mixer", "build_mixer"]

QUIET: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}


@dataclass
class Mixer:
    target: gr.Radio
    """The column that the mix is written into."""
    parts: gr.Dropdown
    """Its choices are the adapters that can be mixed."""


def build_mixer(columns: gr.Radio, models: Sequence[gr.Dropdown]) -> Mixer:
    """Add the panel to the page that is being built."""
    with gr.Accordion("Mix adapters", open=False, elem_id="mix"):
        with gr.Row():
            target = gr.Radio(
                [1, 2],
                value=2,
                label="Mix in column",
                elem_id="mix-column",
                scale=1,
                min_width=300,
            )
            parts = gr.Dropdown(
                [],
                label=f"Adapters (up to {LIMIT})",
                multiselect=True,
                max_choices=LIMIT,
                # A part may leave the server, or be read from a model that somebody typed.
                allow_custom_value=True,
                elem_id="mix-parts",
                scale=3,
                min_width=300,
            )
        with gr.Row():
            weights = [
                gr.Slider(
                    -2,
                    2,
                    1,
                    step=0.05,
                    label=f"Weight {i + 1}",
                    visible=False,
                    min_width=220,
                    elem_id=f"weight-{i + 1}",
                )
                for i in range(LIMIT)
            ]
        said = gr.Textbox(
            "", label="Model of this column", interactive=False, elem_id="mix-expression"
        )

    def show(names: list[str]) -> list[Any]:
        """Return one slider for each part, with its name."""
        return [
            gr.update(visible=True, label=f"Weight of {names[i]}")
            if i < len(names)
            else gr.update(visible=False, value=1)
            for i in range(LIMIT)
        ]

    def write(count: int, column: int, names: list[str], *values: float) -> list[Any]:
        """Return the expression, the number of columns, and the models."""
        text = expression(dict(zip(names or [], values, strict=False)))
        if not text:
            return ["", gr.skip(), *[gr.skip()] * len(models)]
        changed = [
            gr.update(value=text) if i + 1 == column else gr.skip() for i in range(len(models))
        ]
        return [text, max(count, column), *changed]

    def read(column: int, names: list[str], *chosen: str) -> list[Any]:
        """Return the parts and weights of the mix that a column has; none if it has no mix."""
        model = chosen[column - 1] or ""
        known = set(model.replace("*", "+").split("+"))
        weight_by_name = parts_of(model, known) if "+" in model or "*" in model else {}
        found = list(weight_by_name)[:LIMIT]
        sliders = [
            gr.update(visible=True, label=f"Weight of {found[i]}", value=weight_by_name[found[i]])
            if i < len(found)
            else gr.update(visible=False, value=1)
            for i in range(LIMIT)
        ]
        return [found, model if found else "", *sliders]

    written = [said, columns, *models]
    parts.input(show, [parts], weights, **QUIET).then(
        write, [columns, target, parts, *weights], written, **QUIET
    )
    for weight in weights:
        weight.input(
            write, [columns, target, parts, *weights], written, **QUIET, trigger_mode="always_last"
        )
    target.input(read, [target, parts, *models], [parts, said, *weights], **QUIET)
    return Mixer(target, parts)
