"""Every route of the server: what it is for, who may ask, and where it names its model.

vLLM decides which routes it mounts, from the model's tasks, its flags and its environment, and its
own key check looks at four path prefixes only. This table is ours and complete for vLLM 0.32; a
route that is not in it is not served (see ``guard.py``), so that a new one cannot answer for the
wrong model or without a key. A test builds vLLM's app for every task and holds its routes against
the table.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from starlette.routing import compile_path

__all__ = [
    "ROUTES",
    "SAGEMAKER_ADAPTER",
    "WEBSOCKET",
    "Access",
    "Purpose",
    "Route",
    "find_route",
    "routed_path",
]

Purpose = Literal["generate", "cancel", "read", "admin", "refused"]
"""``generate``: the engine's weights answer (text, embeddings, scores, transcripts). ``cancel``:
ends a request of the caller's own. ``read``: touches no weights. ``admin``: changes the server or
shows its insides. ``refused``: vLLM mounts it, we do not serve it."""

Access = Literal["anyone", "user", "admin"]
"""``user``: whoever has a key of ``--api-key`` or ``--keys``, anyone if neither is given.
``admin``: whoever has the key of ``--admin-api-key`` or an admin's of ``--keys``, direct requests
on loopback if neither is given."""

WEBSOCKET = "WEBSOCKET"
"""Stands for the method where a WebSocket is opened."""

SAGEMAKER_ADAPTER = "x-amzn-sagemaker-adapter-identifier"
"""What vLLM takes as the model of ``/invocations``. It *replaces* the body's ``model``, by null
where the header is missing, and null is answered by the base."""


@dataclass(frozen=True)
class Route:
    """One path template (as Starlette writes it) with the methods that this entry is about.

    ``model`` says where the request names its model: the ``model`` field of a JSON body, of a
    multipart form, or of a WebSocket's ``session.update``; None if it names none.
    ``model_header`` is a header that overrides the body's.
    """

    path: str
    methods: tuple[str, ...]
    purpose: Purpose
    access: Access
    model: Literal["json", "form", "websocket"] | None = None
    model_header: str | None = None


def _generating() -> Iterator[Route]:
    for path in (
        "/v1/completions",
        "/v1/chat/completions",
        "/v1/chat/completions/batch",
        "/v1/responses",
        "/v1/messages",
        "/v1/systemone",
        "/cohere/v2/chat",
        "/generative_scoring",
        "/inference/v1/generate",
        "/v1/embeddings",
        "/v2/embed",
        "/pooling",
        "/classify",
        "/score",
        "/v1/score",
        "/rerank",
        "/v1/rerank",
        "/v2/rerank",
    ):
        yield Route(path, ("POST",), "generate", "user", "json")
    yield Route("/invocations", ("POST",), "generate", "user", "json", SAGEMAKER_ADAPTER)
    for path in ("/v1/audio/transcriptions", "/v1/audio/translations"):
        yield Route(path, ("POST",), "generate", "user", "form")
    yield Route("/v1/realtime", (WEBSOCKET,), "generate", "user", "websocket")
    for path in ("/v1/responses/{response_id}/cancel", "/inference/v1/abort_requests"):
        yield Route(path, ("POST",), "cancel", "user")


def _reading() -> Iterator[Route]:
    # Work on the caller's own text, of any length: not for strangers.
    for path in (
        "/tokenize",
        "/detokenize",
        "/v1/messages/count_tokens",
        "/v1/completions/render",
        "/v1/chat/completions/render",
        "/v1/messages/render",
        "/v1/responses/render",
        "/cohere/v2/chat/render",
        "/v1/completions/derender",
        "/v1/chat/completions/derender",
    ):
        yield Route(path, ("POST",), "read", "user", "json")
    for path in (
        "/v1/models",
        "/v1/models/{model_id:path}",
        "/v1/responses/{response_id}",
        "/tokenizer_info",
        "/v1/adapters",
        "/v1/adapters/{name}",
        "/v1/adapters/{name}/changes",
    ):
        yield Route(path, ("GET",), "read", "user")
    for path in (
        "/health",
        "/load",
        "/version",
        "/kv_event_sources",
        "/metrics{rest:path}",
        "/openapi.json",
        "/docs",
        "/docs/oauth2-redirect",
        "/redoc",
        "/static{rest:path}",
        "/is_paused",
        "/is_sleeping",
        "/weight_info",
        "/get_world_size",
        "/fault_tolerance/status",
    ):
        yield Route(path, ("GET",), "read", "anyone")
    yield Route("/ping", ("GET", "POST"), "read", "anyone")
    yield Route("/is_scaling_elastic_ep", ("POST",), "read", "anyone")


def _changing() -> Iterator[Route]:
    yield Route("/admin/fold", ("GET", "POST"), "admin", "admin")
    for path in ("/v1/adapters/{name}", "/v1/aliases/{alias}"):
        yield Route(path, ("PUT", "DELETE"), "admin", "admin")
    yield Route("/v1/adapters/{name}/weights", ("PUT",), "admin", "admin")
    for path in (
        "/admin/unfold",
        "/v1/adapters/reload",
        "/v1/adapters/{name}/rollback",
        "/v1/adapters/{name}/pin",
        # Our handlers, also where VLLM_ALLOW_RUNTIME_LORA_UPDATING has vLLM mount its own.
        "/v1/load_lora_adapter",
        "/v1/unload_lora_adapter",
        "/scale_elastic_ep",
        # --enable-fault-tolerance, --profiler-config, --tokens-only
        "/fault_tolerance/apply",
        "/start_profile",
        "/stop_profile",
        "/abort_requests",
        # VLLM_SERVER_DEV_MODE
        "/collective_rpc",
        "/sleep",
        "/wake_up",
        "/release_kv_cache_memory",
        "/reset_prefix_cache",
        "/reset_mm_cache",
        "/reset_encoder_cache",
        "/pause",
        "/resume",
        "/init_weight_transfer_engine",
        "/shutdown_weight_transfer_engine",
        "/start_weight_update",
        "/start_draft_weight_update",
        "/update_weights",
        "/finish_weight_update",
        "/update_weight_version",
        "/weight_checker",
    ):
        yield Route(path, ("POST",), "admin", "admin")
    yield Route("/server_info", ("GET",), "admin", "admin")
    # SageMaker's names for vLLM's own loading and unloading of any path under any name.
    yield Route("/adapters", ("GET", "POST"), "refused", "admin")
    yield Route("/adapters/{adapter_name}", ("DELETE",), "refused", "admin")


ROUTES: tuple[Route, ...] = (*_generating(), *_reading(), *_changing())

# Starlette's own patterns: a path that they read otherwise than its router would be a way around.
_PATTERNS: tuple[tuple[re.Pattern[str], Route], ...] = tuple(
    (compile_path(route.path)[0], route)
    for route in sorted(ROUTES, key=lambda r: ("{" in r.path, r.path))
)


def find_route(path: str, method: str) -> Route | None:
    """Return the table's entry for a request, or None if there is none.

    Args:
        path: as Starlette routes it, see :func:`routed_path`.
        method: HTTP method; HEAD counts as GET; :data:`WEBSOCKET` for a WebSocket.
    """
    asked = "GET" if method == "HEAD" else method
    for pattern, route in _PATTERNS:
        if asked in route.methods and pattern.match(path):
            return route
    return None


def routed_path(scope: Any) -> str:
    """Return the path that Starlette's router looks at: without ``--root-path`` in front."""
    path, root = str(scope.get("path", "")), str(scope.get("root_path", ""))
    inside = path == root or path.startswith(f"{root}/")
    return path[len(root) :] if root and inside else path
