"""Proves that the router's configuration sends an adapter's requests to one server.

Runs HAProxy (2.6 or newer) with deploy/kubernetes/router/haproxy.cfg on loopback; only the line
that finds servers through Kubernetes' DNS is replaced by the addresses of three small HTTP servers.
Skips where HAProxy is not installed.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.support import ROOT

CONFIG = ROOT / "deploy" / "kubernetes" / "router" / "haproxy.cfg"
HAPROXY = shutil.which("haproxy") or shutil.which("haproxy", path="/usr/sbin")
MODELS = [f"adapter-{i}" for i in range(60)]

pytestmark = pytest.mark.skipif(HAPROXY is None, reason="HAProxy is not installed")


class Handler(BaseHTTPRequestHandler):
    """Answers health checks, and requests with its own port and what a proxy has added."""

    def answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        forwarded = self.headers.get("X-Forwarded-For")
        body = json.dumps({"server": self.server.server_port, "forwarded": forwarded}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST = do_PUT = do_DELETE = answer

    def log_message(self, *_: object) -> None:
        pass


class Router:
    """A running HAProxy, and the servers behind it."""

    def __init__(self, folder: Path) -> None:
        self.servers = [ThreadingHTTPServer(("127.0.0.1", 0), Handler) for _ in range(3)]
        for server in self.servers:
            threading.Thread(target=server.serve_forever, daemon=True).start()
        lines = CONFIG.read_text("utf-8").splitlines()
        (place,) = (i for i, line in enumerate(lines) if line.strip().startswith("server-template"))
        lines[place : place + 1] = [
            f"  server s{i} 127.0.0.1:{server.server_port} inter 200ms"
            for i, server in enumerate(self.servers)
        ]
        config = folder / "haproxy.cfg"
        config.write_text("\n".join(lines) + "\n", "utf-8")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        environment = os.environ | {"ROUTER_BIND": f"127.0.0.1:{self.port}"}
        assert HAPROXY is not None
        self.process = subprocess.Popen([HAPROXY, "-db", "-f", str(config)], env=environment)
        for _ in range(100):
            try:
                self.ask("GET", "/health")
                return
            except OSError:
                time.sleep(0.1)
        raise AssertionError("HAProxy does not answer")

    def ask(self, method: str, path: str, body: object = None) -> dict[str, object]:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=20) as answer:
            return json.load(answer)

    def server_of(self, model: str, **more: object) -> object:
        return self.ask("POST", "/v1/completions", {**more, "model": model})["server"]

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(20)
        for server in self.servers:
            server.shutdown()
            server.server_close()


@pytest.fixture
def router(tmp_path: Path) -> Iterator[Router]:
    running = Router(tmp_path)
    yield running
    running.close()


def test_an_adapter_and_its_versions_stay_on_one_server(router: Router) -> None:
    first = {model: router.server_of(model) for model in MODELS}
    assert set(first.values()) == {server.server_port for server in router.servers}
    for model in MODELS:
        assert router.server_of(f"{model}@0123abcd") == first[model]
        # The name stands behind a long prompt.
        assert router.server_of(model, prompt="x" * 150_000) == first[model]
    # Without a model, and beyond what the router reads: to any server, but answered.
    assert len({router.ask("GET", "/v1/models")["server"] for _ in range(9)}) == 3
    assert router.server_of("adapter-1", prompt="x" * 1_000_000)


def test_a_server_that_goes_moves_only_its_own_adapters(router: Router) -> None:
    first = {model: router.server_of(model) for model in MODELS}
    gone = router.servers[0]
    gone.shutdown()
    gone.server_close()
    # Asked at once: a request that finds the server dead is sent to another one.
    again = {model: router.server_of(model) for model in MODELS}
    time.sleep(1)
    for answers in (again, {model: router.server_of(model) for model in MODELS}):
        assert gone.server_port not in answers.values()
        moved = {model for model in MODELS if answers[model] != first[model]}
        assert moved == {model for model in MODELS if first[model] == gone.server_port}


def test_nothing_passes_that_would_change_one_server_alone(router: Router) -> None:
    for method, path in (
        ("POST", "/admin/fold"),
        ("GET", "/admin/fold"),
        ("POST", "/v1/load_lora_adapter"),
        ("POST", "/v1/unload_lora_adapter"),
        ("PUT", "/v1/adapters/x"),
        ("DELETE", "/v1/adapters/x"),
        ("POST", "/v1/adapters/reload"),
    ):
        with pytest.raises(urllib.error.HTTPError) as error:
            router.ask(method, path, {})
        assert error.value.code == 403, path
        error.value.close()
    assert router.ask("GET", "/v1/adapters")["server"]
    # A server must not take what comes through the router for a direct request on its machine.
    assert router.ask("GET", "/v1/models")["forwarded"] == "127.0.0.1"
