"""The operator's routes: fold an adapter into the running engine, unfold it, ask what is folded.

    curl -X POST localhost:8000/admin/fold -H 'Content-Type: application/json' -d '{"name": "x"}'
    curl -X POST localhost:8000/admin/unfold
    curl localhost:8000/admin/fold

A ``vllm.endpoint_plugins`` entry point, always loaded. Who may ask these routes is decided in
``guard.py``.
"""

from __future__ import annotations

import asyncio
from argparse import Namespace
from enum import Enum
from types import SimpleNamespace
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from secura_serve.errors import ConfigError, FoldError
from secura_serve.serve.app.adapters.attach_to_engine import attach_to_engine
from secura_serve.serve.app.folding import DEFAULT_TIMEOUT, Folding
from secura_serve.serve.app.http import adapters
from secura_serve.serve.app.http.admission import AdmissionMiddleware, Refusal
from secura_serve.serve.app.http.context import ServerContext, context_of
from secura_serve.serve.app.http.errors import answer_http_errors
from secura_serve.serve.app.http.unsupported import answer_unsupported_requests
from secura_serve.serve.app.request_counts import count_requests
from secura_serve.serve.app.scrape import AdapterStates, ScrapeMiddleware
from secura_serve.serve.compat import background_tasks

__all__ = ["AdminPlugin"]

_LONGEST = 3600.0


class Fold(BaseModel):
    """Body of ``POST /admin/fold``."""

    model_config = ConfigDict(extra="forbid")
    name: str = Field(description="the adapter, as /v1/models calls it")
    timeout: float = Field(
        default=DEFAULT_TIMEOUT,
        gt=0,
        le=_LONGEST,
        strict=True,
        description="seconds to wait for running requests",
    )


class Unfold(BaseModel):
    """Body of ``POST /admin/unfold``; may be left out."""

    model_config = ConfigDict(extra="forbid")
    timeout: float = Field(
        default=DEFAULT_TIMEOUT, gt=0, le=_LONGEST, strict=True, description="as for /admin/fold"
    )


def _context(request: Request) -> ServerContext:
    return context_of(request.app)


Context = Annotated[ServerContext, Depends(_context)]


async def _change(folding: Folding, name: str | None, timeout: float) -> JSONResponse:
    # A client that goes away must not leave the work half done.
    work = asyncio.ensure_future(folding.change(name, timeout))
    try:
        return JSONResponse(await asyncio.shield(work))
    except (ConfigError, FoldError) as error:
        status = 404 if isinstance(error, ConfigError) else 409
        return Refusal(status, str(error), "name").response()


async def get_fold(context: Context) -> dict[str, Any]:
    """Return what is folded, and what could be.

    ``busy``: a change is under way. ``holding``: new requests wait for it; before that they are
    still judged by what is folded now. ``running_requests``: those that the change waits for.
    ``changed_on_disk``: adapters that are served as they were when they were verified, while
    their folders hold something else by now.
    """
    folding = context.folding
    return {
        "folded": context.answers.folded,
        "busy": folding.busy,
        "holding": folding.admission.holding,
        "running_requests": folding.admission.running,
        "foldable": folding.foldable(),
        "changed_on_disk": await asyncio.to_thread(folding.changed_on_disk),
    }


async def fold(body: Fold, context: Context) -> JSONResponse:
    """Fold an adapter into the weights: its requests then cost what the base's cost."""
    return await _change(context.folding, body.name, body.timeout)


async def unfold(context: Context, body: Unfold | None = None) -> JSONResponse:
    """Put the base's weights back: base and adapters answer as before."""
    return await _change(context.folding, None, (body or Unfold()).timeout)


async def get_model(model_id: str, request: Request, context: Context) -> Any:
    """Return one model's card, as OpenAI's API does."""
    listed = await request.app.state.openai_serving_models.show_available_models()
    for card in listed.data:
        if card.id == model_id:
            return card
    return Refusal(404, context.answers.unknown(model_id)).response()


class AdminPlugin:
    """vLLM's ``EndpointPlugin`` protocol."""

    name = "secura_admin"
    required_tasks = None

    def attach_router(self, app: FastAPI) -> None:
        """Add our routes, and admission in front of all others (inside the guard).

        Raises:
            ServeError: the app was not started by secura-serve.
        """
        context, args = context_of(app), app.state.args
        if context.keys.needed:
            # vLLM's own check runs inside ours, and would refuse the admin key below /v1.
            args.api_key = list(context.keys.plain)
        for path, method, handler in (
            ("/admin/fold", "GET", get_fold),
            ("/admin/fold", "POST", fold),
            ("/admin/unfold", "POST", unfold),
            ("/v1/models/{model_id:path}", "GET", get_model),
        ):
            tags: list[str | Enum] = ["admin" if path.startswith("/admin") else "models"]
            app.add_api_route(path, handler, methods=[method], response_model=None, tags=tags)
        app.add_middleware(
            AdmissionMiddleware,
            admission=context.folding.admission,
            background=lambda: background_tasks(app.state)(),
            bases=context.answers.names,
        )
        if context.metrics is not None:
            states = AdapterStates(context.metrics, context.updates, context.folding)
            app.add_middleware(ScrapeMiddleware, states=states)
        answer_http_errors(app)
        answer_unsupported_requests(app)
        adapters.attach(app)
        context.attached = True

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Take hold of the engine; fold what ``--fold`` names before the first request.

        Raises:
            FoldError: that fold failed, and the server does not start.
            UnservableError: ``--strict``, and a worker refuses an adapter.
            IncompatibleVLLMError: this vLLM keeps background answers elsewhere.
        """
        context, models = context_of(SimpleNamespace(state=state)), state.openai_serving_models
        background_tasks(state)
        if context.metrics is not None:
            count_requests(engine_client, context.metrics, context.answers.base_label)
        await attach_to_engine(context, engine_client, models)
        if context.fold_at_start is not None:
            await context.folding.change(context.fold_at_start)
