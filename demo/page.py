"""What the page does: ask the endpoint what it serves, fill in an example, run, stop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import gradio as gr
import openai

from .cards import cards, hint, status
from .compare import Comparison, Settings
from .endpoint import explain, list_models

REDRAW_S = 0.1
ANY = ""  # the name under which an example belongs to no adapter and leaves the ticks alone
Examples = Mapping[str, Sequence[Mapping[str, str]]]


class Page:
    """The handlers of one endpoint's page; what they return goes to components of that name."""

    def __init__(self, client: openai.AsyncOpenAI, examples: Examples) -> None:
        self.client = client
        self.endpoint = str(client.base_url).rstrip("/")
        self.examples = examples
        self.running: dict[str | None, Comparison] = {}

    async def refresh(self, ticked: list[str]) -> tuple[Any, ...]:
        """Ask the endpoint what it serves -> status, models, bases, adapters, example chips."""
        try:
            served = await list_models(self.client)
        except openai.OpenAIError as error:
            sentence = f"{explain(error, self.endpoint)} Then press Refresh."
            empty = gr.CheckboxGroup(choices=[], value=[])
            return status(sentence, up=False), empty, [], [], self._chips([])
        bases = [model.id for model in served if model.parent is None]
        adapters = [model.id for model in served if model.parent is not None]
        choices = [(f"{name} (base)", name) for name in bases] + [(name, name) for name in adapters]
        kept = [name for name in ticked if name in bases + adapters]
        models = gr.CheckboxGroup(choices=choices, value=kept or bases[:1] + adapters[:1])
        count = f"{len(adapters)} adapter{'' if len(adapters) == 1 else 's'}"
        said = f"{', '.join(bases)} and {count}"
        if folded := next((model for model in served if model.folded), None):
            said = f"{folded.id}, folded into {folded.parent}: nothing else answers until unfolded,"
        line = status(f"{said} at {self.endpoint}", up=True)
        return line, models, bases, adapters, self._chips(adapters)

    def _chips(self, adapters: Sequence[str]) -> gr.Dataset:
        rows = [
            [name, example.get("system", ""), example["prompt"]]
            for name, examples in self.examples.items()
            if name == ANY or name in adapters
            for example in examples
        ]
        labels = [f"{name} · {prompt}" if name else prompt for name, _, prompt in rows]
        return gr.Dataset(samples=rows, sample_labels=labels, visible=bool(rows))

    def pick(self, row: list[str], bases: list[str], ticked: list[str]) -> tuple[Any, ...]:
        """Return system prompt, prompt and models of the example that was clicked."""
        name, system, prompt = row
        return system, prompt, [*bases[:1], name] if name else ticked

    async def run(
        self,
        ticked: list[str],
        prompt: str,
        system: str,
        max_tokens: float,
        temperature: float,
        seed: float | None,
        adapters: list[str],
        request: gr.Request,
    ) -> AsyncIterator[tuple[Any, ...]]:
        """Stream the answers as HTML, each time with the run button and the stop button."""
        idle = gr.Button(interactive=True), gr.Button(interactive=False)
        busy = gr.Button(interactive=False), gr.Button(interactive=True)
        if not ticked or not prompt.strip():
            yield hint("Tick at least one model." if not ticked else "Write a prompt."), *idle
            return
        settings = Settings(int(max_tokens), temperature, None if seed is None else int(seed))
        comparison = Comparison(self.client, ticked, prompt, system.strip(), settings)
        self.running[request.session_hash] = comparison
        try:
            yield cards(comparison.answers, adapters), *busy
            drawn = 0.0
            async for answers in comparison:
                # A browser that redraws after every token is slower than the model.
                await asyncio.sleep(max(0.0, drawn + REDRAW_S - time.monotonic()))
                drawn = time.monotonic()
                yield cards(answers, adapters), *busy
            yield cards(comparison.answers, adapters), *idle
        finally:
            # Also reached when the browser has gone.
            comparison.stop()
            self.running.pop(request.session_hash, None)

    async def stop(self, request: gr.Request) -> None:
        if comparison := self.running.get(request.session_hash):
            comparison.stop()
