"""Proves that the table of routes is complete, and that it reads a path as the app's router does.

Needs vLLM, whose app is built for every task without an engine, and its sources. A route that a
new vLLM adds fails here before it can answer for the wrong model or without a key.
"""

from __future__ import annotations

import ast
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.routing import Match, Mount

from secura_serve.serve.app.http.routes import ROUTES, WEBSOCKET, find_route, routed_path

vllm = pytest.importorskip("vllm")

# Adds routes of its own to apps that secura-serve does not build.
OTHER_APPS = ("cli/preload.py", "launchers/dp_supervisor.py")
METHODS = ("get", "post", "put", "patch", "delete", "head", "websocket")
EVERYTHING = [
    "--enable-scale-out",
    "--enable-tokenizer-info-endpoint",
    "--enable-fault-tolerance",
    "--profiler-config",
    '{"profiler": "torch", "torch_profiler_dir": "/tmp"}',
]
SWITCHES = (
    "VLLM_SERVER_DEV_MODE",
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING",
    "VLLM_ENABLE_COHERE_API",
)


def build(tasks, *flags):
    """vLLM's app for a model with ``tasks``; pooling routes ask a model's configuration."""
    from vllm.entrypoints.launchers.app import build_app

    from secura_serve.serve import compat

    parser, _ = compat.make_arg_parser()
    pooling = [task for task in tasks if task in ("embed", "classify", "token_embed")]
    model = SimpleNamespace(
        get_pooling_task=lambda _: pooling[0] if pooling else None,
        hf_config=SimpleNamespace(num_labels=1),
        architecture="Any",
        io_processor_plugin=None,
    )
    return build_app(parser.parse_args(list(flags)), tuple(tasks), model)


@pytest.fixture(scope="module")
def apps():
    before = dict(os.environ)
    os.environ.update(dict.fromkeys(SWITCHES, "1"))
    try:
        yield {
            "generate": build(["generate", "render"], *EVERYTHING),
            "offline docs": build(["generate"], "--enable-offline-docs", "--tokens-only"),
            "speech": build(["generate", "transcription", "realtime"]),
            "embed": build(["embed"]),
            "classify": build(["classify"]),
            "token_embed": build(["token_embed"]),
        }
    finally:
        os.environ.clear()
        os.environ.update(before)


def mounted(app):
    """(path template, method) of everything that an app answers to."""
    for route in app.routes:
        if isinstance(route, Mount):
            yield route.path, "GET"
        else:
            for method in getattr(route, "methods", None) or [WEBSOCKET]:
                yield route.path, method


def test_every_route_of_the_built_apps_is_in_the_table(apps):
    known = {(r.path.partition("{rest")[0].rstrip("/"), m) for r in ROUTES for m in r.methods}
    everything = {pair for app in apps.values() for pair in mounted(app)}
    missing = {(p, m) for p, m in everything if m != "HEAD"} - known
    assert not missing, "add these to serve/app/http/routes.py, each with who may ask it"
    assert len(everything) > 70
    paths = {path for path, _ in everything}
    assert {"/invocations", "/v1/realtime", "/score", "/v2/embed", "/adapters"} <= paths


def test_every_route_in_the_sources_of_vllm_is_in_the_table():
    """Also those that need a package or a model that is not here."""
    root = Path(vllm.__file__).parent / "entrypoints"
    missing = []
    for file in sorted(root.rglob("*.py")):
        if file.relative_to(root).as_posix() in OTHER_APPS:
            continue
        for call in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute):
                missing += [
                    (file.name, path, method)
                    for path, method in _declared(call)
                    if find_route(path, method) is None
                ]
    assert not missing


def _declared(call):
    """Paths and methods that ``x.post("/path")`` or ``x.add_api_route("/path")`` mounts."""
    name, first = call.func.attr, call.args[0] if call.args else None
    if not (isinstance(first, ast.Constant) and str(first.value).startswith("/")):
        return []
    if name in METHODS:
        return [(first.value, WEBSOCKET if name == "websocket" else name.upper())]
    if name in ("add_api_route", "api_route", "route", "add_route"):
        given = [k.value for k in call.keywords if k.arg == "methods"]
        return [(first.value, m) for m in (ast.literal_eval(given[0]) if given else ["GET"])]
    return [(first.value, "GET")] if name == "mount" else []


def test_what_generates_names_its_model_and_nothing_is_listed_twice():
    pairs = [(route.path, method) for route in ROUTES for method in route.methods]
    assert len(pairs) == len(set(pairs))
    for route in ROUTES:
        assert (route.purpose == "generate") <= (route.model is not None), route
        if route.purpose in ("generate", "cancel"):
            assert route.access == "user", route
        if route.purpose in ("admin", "refused"):
            assert route.access == "admin", route


def test_the_root_path_is_left_out_as_starlette_does():
    from starlette._utils import get_route_path

    for root in ("", "/api", "/v1"):
        for path in ("/api/v1/models", "/apiv1/models", "/api", "/v1/models", "/v1/v1/models", "/"):
            scope = {"path": path, "root_path": root}
            assert routed_path(scope) == get_route_path(scope), scope


PIECES = st.sampled_from(
    sorted({part for route in ROUTES for part in route.path.split("/")})
    + ["..", ".", "", "\n", "%2f", "V1", "v1\n", "admin", "x", "{id}", "\x00", "ſcore"]
)


@settings(max_examples=1500, deadline=None)
@given(
    st.lists(PIECES, min_size=1, max_size=5).map(lambda parts: "/" + "/".join(parts))
    | st.sampled_from(ROUTES).map(lambda route: route.path)
    | st.tuples(st.sampled_from(ROUTES), st.sampled_from(["\n", "/", "//", "%0a", "?", ";a", " "]))
    .map(lambda pair: pair[0].path + pair[1]),
    st.sampled_from(["GET", "POST", "DELETE", "PUT", "HEAD"]),
)  # fmt: skip
def test_no_path_reaches_a_route_that_the_table_reads_as_another(apps, path, method):
    scope = {"type": "http", "path": path, "root_path": "", "method": method, "headers": []}
    for app in (apps["generate"], apps["classify"]):
        full = [r for r in app.routes if r.matches(dict(scope))[0] is Match.FULL]
        if not full or isinstance(full[0], Mount):
            continue
        entry = find_route(path, method)
        assert entry is not None and entry.path.partition("{rest")[0] == full[0].path, path
