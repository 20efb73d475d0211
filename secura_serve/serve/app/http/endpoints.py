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
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field
from vllm import envs

from secura_serve.errors import ConfigError, FoldError, SecuraError
from secura_serve.serve.app.folding import DEFAULT_TIMEOUT, Folding
from secura_serve.serve.app.http.access import Keys
from secura_serve.serve.app.http.admission import AdmissionMiddleware, Refusal
from secura_serve.serve.app.http.guard import say_attached, use_keys
from secura_serve.serve.app.http.loading import AdapterLoading
from secura_serve.serve.compat import ServedModels, background_tasks

__all__ = ["AdminPlugin", "configure"]

_LONGEST = 3600.0


class _Settings:
    """Handed over in this process: vLLM would print what stands in its arguments."""

    configured = False
    folding: Folding | None = None
    loading: AdapterLoading | None = None
    keys = Keys()
    at_start: str | None = None


def configure(
    folding: Folding,
    *,
    keys: Keys,
    at_start: str | None = None,
    loading: AdapterLoading | None = None,
) -> None:
    """Say what :class:`AdminPlugin` will serve.

    Args:
        folding: what can be folded, which may be nothing.
        keys: what the guard asks for.
        at_start: adapter to fold before the first request.
        loading: what answers where vLLM is told to load adapters at runtime.
    """
    _Settings.configured, _Settings.loading = True, loading
    _Settings.folding, _Settings.keys, _Settings.at_start = folding, keys, at_start
    use_keys(keys)


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


async def _change(name: str | None, timeout: float) -> JSONResponse:
    assert _Settings.folding is not None
    # A client that goes away must not leave the work half done.
    work = asyncio.ensure_future(_Settings.folding.change(name, timeout))
    try:
        return JSONResponse(await asyncio.shield(work))
    except (ConfigError, FoldError) as error:
        status = 404 if isinstance(error, ConfigError) else 409
        return Refusal(status, str(error), "name").response()


async def folded() -> dict[str, Any]:
    """What is folded, and what could be.

    ``busy``: a change is under way. ``holding``: new requests wait for it; before that they are
    still judged by what is folded now. ``running_requests``: those that the change waits for.
    ``changed_on_disk``: adapters that are served as they were at the start, while their folders
    hold something else by now.
    """
    folding = _Settings.folding
    assert folding is not None
    return {
        "folded": folding.folded,
        "busy": folding.busy,
        "holding": folding.admission.holding,
        "running_requests": folding.admission.running,
        "foldable": list(folding.paths),
        "changed_on_disk": await asyncio.to_thread(folding.changed_on_disk),
    }


async def fold(body: Fold) -> JSONResponse:
    """Fold an adapter into the weights: its requests then cost what the base's cost."""
    return await _change(body.name, body.timeout)


async def unfold(body: Unfold | None = None) -> JSONResponse:
    """Put the base's weights back: base and adapters answer as before."""
    return await _change(None, (body or Unfold()).timeout)


async def get_model(model_id: str, request: Request) -> Any:
    """Return one model's card, as OpenAI's API does."""
    assert _Settings.folding is not None
    listed = await request.app.state.openai_serving_models.show_available_models()
    for card in listed.data:
        if card.id == model_id:
            return card
    return Refusal(404, _Settings.folding.unknown(model_id)).response()


def _routes() -> APIRouter:
    router = APIRouter(prefix="/admin", tags=["admin"])
    router.add_api_route("/fold", folded, methods=["GET"])
    router.add_api_route("/fold", fold, methods=["POST"], response_model=None)
    router.add_api_route("/unfold", unfold, methods=["POST"], response_model=None)
    return router


class AdminPlugin:
    """vLLM's ``EndpointPlugin`` protocol."""

    name = "secura_admin"
    required_tasks = None

    def __init__(self) -> None:
        if not _Settings.configured:
            raise SecuraError("the plugin secura_admin belongs to secura-serve; start that")

    def attach_router(self, app: FastAPI) -> None:
        """Add the routes, and admission in front of all others (inside the guard)."""
        keys, args, folding = _Settings.keys, app.state.args, _Settings.folding
        assert folding is not None
        if keys.user and keys.admin:
            # vLLM's own check runs inside ours, and would refuse the admin key below /v1.
            args.api_key = [*keys.user, keys.admin]
        app.include_router(_routes())
        app.add_api_route("/v1/models/{model_id:path}", get_model, response_model=None)
        app.add_middleware(
            AdmissionMiddleware,
            admission=folding.admission,
            background=lambda: background_tasks(app.state)(),
        )
        if envs.VLLM_ALLOW_RUNTIME_LORA_UPDATING and _Settings.loading is not None:
            _Settings.loading.attach(app)
        say_attached()

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Take hold of the engine; fold what ``--fold`` names before the first request.

        Raises:
            FoldError: that fold failed, and the server does not start.
        """
        folding, models = _Settings.folding, state.openai_serving_models
        assert folding is not None
        background_tasks(state)
        folding.bind(engine_client, ServedModels(models))
        if _Settings.loading is not None:
            _Settings.loading.bind(models)
        if _Settings.at_start is not None:
            await folding.change(_Settings.at_start)
