"""What the chat tab does: ask, ask again, edit, stop and clear."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import gradio as gr

from ..compare import Comparison, Settings
from ..endpoint import encodable
from ..server import Server
from .conversation import Conversation
from .display import COLUMNS, buttons, differences, nothing, redrawn, step
from .safe_text import without_joiners

__all__ = ["Chat", "Handler"]

REDRAW_S = 0.15
Handler = Callable[..., AsyncIterator[list[Any]]]


class Chat:
    """The handlers of one page; each yields prompt, buttons, and what the columns show."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.running: dict[str | None, Comparison] = {}

    async def send(
        self,
        request: gr.Request,
        prompt: str,
        conversations: list[Conversation],
        columns: int,
        marked: bool,
        system: str,
        *values: Any,
    ) -> AsyncIterator[list[Any]]:
        """Ask all columns the same.

        ``values`` are the numbers of the settings, and the model of each column.
        """
        settings, models = _settings(values[:-COLUMNS]), values[-COLUMNS:]
        asked = [i for i in range(columns) if (models[i] or "").strip()]
        if request.session_hash in self.running or not prompt.strip() or not asked:
            if not asked:
                gr.Warning("Choose a model first.")
            yield nothing()
            return
        for i in asked:
            conversations[i].ask(models[i].strip(), encodable(prompt).strip())
        async for update in self._run(request, conversations, asked, system, settings, marked):
            yield update

    async def retry(
        self,
        request: gr.Request,
        conversations: list[Conversation],
        columns: int,
        marked: bool,
        system: str,
        *values: Any,
    ) -> AsyncIterator[list[Any]]:
        """Ask the last turn of every column again, of the model that the column has now."""
        every = [i for i in range(columns) if conversations[i].turns]
        async for update in self._again(
            request, conversations, every, None, marked, system, values
        ):
            yield update

    def retry_one(self, column: int) -> Handler:
        """Return the handler of one column's own button."""

        async def retry(
            request: gr.Request,
            conversations: list[Conversation],
            columns: int,
            marked: bool,
            system: str,
            *values: Any,
        ) -> AsyncIterator[list[Any]]:
            one = [column] if conversations[column].turns else []
            steps = self._again(request, conversations, one, None, marked, system, values)
            async for update in steps:
                yield update

        return retry

    def edit(self, column: int) -> Handler:
        """Return the handler of an edited turn: all columns that said the same ask it anew."""

        async def edit(
            request: gr.Request,
            edited: gr.EditData,
            conversations: list[Conversation],
            columns: int,
            marked: bool,
            system: str,
            *values: Any,
        ) -> AsyncIterator[list[Any]]:
            message = edited.index if isinstance(edited.index, int) else edited.index[0]
            turn = message // 2
            before = _prompt(conversations[column], turn)
            same = [i for i in range(columns) if _prompt(conversations[i], turn) == before]
            if request.session_hash in self.running or before is None or column not in same:
                yield redrawn(conversations)
                return
            for i in same:
                del conversations[i].turns[turn + 1 :]
            prompt = without_joiners(encodable(_text(edited.value))).strip() or before
            steps = self._again(request, conversations, same, prompt, marked, system, values)
            async for update in steps:
                yield update

        return edit

    async def stop(self, request: gr.Request) -> None:
        if comparison := self.running.get(request.session_hash):
            comparison.stop()

    def ended(self, request: gr.Request) -> list[Any]:
        """Return Send and Stop as they are once a handler has ended; another may still run.

        While one has not ended, Gradio drops what is sent, so Send waits for this.
        """
        return buttons(running=request.session_hash in self.running)

    async def clear(self, request: gr.Request, conversations: list[Conversation]) -> list[Any]:
        """Forget all turns; what is still answered is stopped."""
        await self.stop(request)
        for conversation in conversations:
            conversation.turns.clear()
        return redrawn(conversations)

    def clear_one(self, column: int) -> Callable[[list[Conversation]], list[Any]]:
        def clear(conversations: list[Conversation]) -> list[Any]:
            conversations[column].turns.clear()
            return redrawn(conversations)

        return clear

    async def models_for_more(self, count: int, before: int, *models: str | None) -> list[Any]:
        """Return the number of columns and their models; a column that comes up gets a model that
        no other shows, while there are any."""
        now = await self.server.snapshot()
        chosen, known = list(models), [*now.bases, *now.served]
        updates: list[Any] = [gr.skip()] * COLUMNS
        for i in range(before, count):
            free = [name for name in known if name not in chosen[:i]]
            if chosen[i] in chosen[:i] and free:
                chosen[i] = updates[i] = free[0]
        return [count, *updates]

    def mark(self, conversations: list[Conversation], columns: int, marked: bool) -> list[Any]:
        """Show or hide how the last answers differ from the first column's."""
        return differences(conversations, columns if marked else 0)

    async def _again(
        self,
        request: gr.Request,
        conversations: list[Conversation],
        asked: Sequence[int],
        prompt: str | None,
        marked: bool,
        system: str,
        values: Sequence[Any],
    ) -> AsyncIterator[list[Any]]:
        if request.session_hash in self.running or not asked:
            yield nothing()
            return
        settings, models = _settings(values[:-COLUMNS]), values[-COLUMNS:]
        for i in asked:
            last = conversations[i].turns.pop()
            conversations[i].ask((models[i] or last.answer.model).strip(), prompt or last.prompt)
        async for update in self._run(request, conversations, asked, system, settings, marked):
            yield update

    async def _run(
        self,
        request: gr.Request,
        conversations: list[Conversation],
        asked: Sequence[int],
        system: str,
        settings: Settings,
        marked: bool,
    ) -> AsyncIterator[list[Any]]:
        answers = {i: conversations[i].turns[-1].answer for i in asked}
        said = encodable(system).strip()
        asks = [(answers[i], conversations[i].messages(said)) for i in asked]
        comparison = Comparison(self.server.answers, asks, settings)
        self.running[request.session_hash] = comparison
        drawn: dict[int, tuple[Any, ...]] = {}
        try:
            yield step(conversations, answers, drawn)
            at = 0.0
            async for _ in comparison:
                # A browser that redraws after every token is slower than the model.
                await asyncio.sleep(max(0.0, at + REDRAW_S - time.monotonic()))
                at = time.monotonic()
                yield step(conversations, answers, drawn)
            marks = [gr.skip()] * (COLUMNS - 1)
            if marked:
                # Words are compared for a while; others are not to wait for that.
                marks = await asyncio.to_thread(differences, conversations, COLUMNS)
            last = step(conversations, answers, drawn)
            yield [*last[: -(COLUMNS - 1)], *marks]
        finally:
            # Also reached when the browser has gone.
            comparison.stop()
            self.running.pop(request.session_hash, None)


def _settings(values: Sequence[Any]) -> Settings:
    limit, heat, top, seed = values
    seed = None if seed is None else int(seed)
    return Settings(int(limit), float(heat), float(top), seed).within_limits()


def _prompt(conversation: Conversation, turn: int) -> str | None:
    turns = conversation.turns
    return turns[turn].prompt if turn < len(turns) else None


def _text(value: Any) -> str:
    """Return the text of a message, which may come in pieces."""
    if isinstance(value, list):
        return "".join(_text(piece) for piece in value)
    if isinstance(value, dict):
        return str(value.get("text", value.get("content", "")))
    return str(value)
