"""A server that speaks the API of ``secura-serve`` and follows a script, for tests of the page.

No engine and no weights: what its models say, how fast, and what it refuses is set by the test.
Adapters and admin routes answer in the shapes of the real ones.
"""

from __future__ import annotations

import copy
import json
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tests.support.engines import free_port

__all__ = ["BASE", "FakeServer", "Script", "adapter_card"]

BASE = "smollm2-135m"
DIGESTS = ("a1b2c3d4e5f6" + "0" * 52, "0f1e2d3c4b5a" + "0" * 52)


@dataclass(frozen=True)
class Script:
    """How one model answers: its pieces of text, seconds between them, or a refusal."""

    pieces: tuple[str, ...] = ("The ", "capital ", "of ", "France ", "is ", "**Paris**.")
    wait_s: float = 0.01
    first_s: float = 0.0
    refusal: tuple[int, str] | None = None
    cut: bool = False
    """Close the connection in the middle."""


def adapter_card(name: str, **changed: Any) -> dict[str, Any]:
    """Return an entry of ``GET /v1/adapters``, with some fields changed."""
    versions = [
        {"digest": digest, "created": 1_790_000_000 + i, "origin": "folder", "state": "known"}
        for i, digest in enumerate(DIGESTS)
    ]
    return {
        "id": name,
        "object": "adapter",
        "state": "known",
        "reason": None,
        "digest": DIGESTS[-1],
        "pinned": False,
        "rolled_back": False,
        "aliases": [],
        "versions": versions,
        "rank": 32,
        "modules": 210,
        "size": 990_000,
        "lora_size": 39_000_000,
        "mode": "per-request",
        "source": f"/srv/adapters/{name}",
        "task": f"What {name} was trained for.",
        "examples": [f"An example for {name}."],
        "scores": {"accuracy": 0.89, "base_accuracy": 0.505, "held_out_loss": 0.134},
        "retention": {"kl": 0.138, "perplexity_ratio": 1.098, "still_right": 0.25},
        "recipe": {"core": "u", "lr": 0.005, "max_steps": 100},
        "type": "cur",
        "magnorm": "none",
        "basis": {"rule": "inverse_sampled", "seed": 0, "id": "b" * 16},
    } | changed


def _metrics() -> dict[str, float]:
    return {
        "vllm:num_requests_running": 0,
        "vllm:num_requests_waiting": 0,
        'secura_adapters{state="known"}': 3,
        'secura_adapters{state="resident"}': 2,
        'secura_adapters{state="pinned"}': 1,
        'secura_adapters{state="refused"}': 0,
        "secura_adapter_versions": 6,
        "secura_adapter_loads_total": 2,
        "secura_adapter_evictions_total": 0,
    }


def _moved() -> dict[str, float]:
    kinds = ("mlp.down_proj", "mlp.gate_proj", "mlp.up_proj", "self_attn.k_proj")
    kinds += ("self_attn.o_proj", "self_attn.q_proj", "self_attn.v_proj")
    names = [f"model.layers.{layer}.{kind}" for layer in range(30) for kind in kinds]
    return {name: 0.04 * (i + 1) / len(names) for i, name in enumerate(names)}


@dataclass
class FakeServer:
    """Start and stop it as often as you like: it keeps its port, and what it was asked."""

    scripts: Mapping[str, Script] = field(default_factory=dict)
    adapters: list[dict[str, Any]] = field(
        default_factory=lambda: [adapter_card("sentiment"), adapter_card("iso-date")]
    )
    api_key: str | None = None
    admin_key: str | None = None
    plain: bool = False
    """A server of vLLM's own: no adapters' routes."""
    slow_s: float = 0.0
    """Seconds before every answer."""
    port: int = field(default_factory=free_port)
    asked: list[dict[str, Any]] = field(default_factory=list)
    """The bodies of all chats."""
    changes: list[tuple[str, str, Any]] = field(default_factory=list)
    folded: str | None = None
    moved: dict[str, float] = field(default_factory=_moved)
    """How far every adapter moves each linear."""
    metrics: dict[str, float] = field(default_factory=_metrics)
    _server: ThreadingHTTPServer | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self) -> FakeServer:
        handler = type("Handler", (_Handler,), {"fake": self})
        ThreadingHTTPServer.request_queue_size = 128
        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def find(self, name: str) -> dict[str, Any] | None:
        return next((each for each in self.adapters if each["id"] == name), None)

    def models(self) -> list[dict[str, Any]]:
        cards = [{"id": BASE, "object": "model", "parent": None, "status": "ready"}]
        for adapter in self.adapters:
            if adapter["state"] != "refused":
                cards.append({"id": adapter["id"], "object": "model", "parent": BASE})
        if self.folded:
            for card in cards:
                card["status"] = "folded" if card["id"] == self.folded else "blocked"
        return cards


class _Handler(BaseHTTPRequestHandler):
    fake: FakeServer

    def do_GET(self) -> None:
        time.sleep(self.fake.slow_s)
        if self.path == "/metrics":
            lines = "".join(f"{key} {value}\n" for key, value in self.fake.metrics.items())
            return self._send(200, lines.encode(), "text/plain; version=0.0.4")
        if self.path == "/admin/fold":
            return self._admin(lambda: self._json(200, {"folded": self.fake.folded}))
        if not self._user():
            return None
        if self.path == "/v1/models":
            return self._json(200, {"object": "list", "data": self.fake.models()})
        if self.path == "/v1/adapters" and not self.fake.plain:
            return self._json(200, {"object": "list", "data": self.fake.adapters})
        path, _, action = self.path.rpartition("/")
        if action == "changes" and path.startswith("/v1/adapters/") and not self.fake.plain:
            return self._tell_changes(path.removeprefix("/v1/adapters/"))
        return self._error(404, "Not Found")

    def _tell_changes(self, name: str) -> None:
        card = self.fake.find(name)
        if card is None:
            return self._error(404, f"there is no adapter '{name}'")
        if card["state"] == "refused":
            return self._error(409, f"{name} changes nothing, it is refused: {card['reason']}")
        told = {"id": name, "object": "changes", "digest": card["digest"]}
        return self._json(200, told | {"modules": self.fake.moved})

    def do_PUT(self) -> None:
        self._admin(self._change)

    do_DELETE = do_PUT

    def do_POST(self) -> None:
        if self.path != "/v1/chat/completions":
            return self._admin(self._change)
        body = json.loads(self._body())
        if self._user():
            self.fake.asked.append(body)
            self._chat(body)
        return None

    def _chat(self, body: dict[str, Any]) -> None:
        script = self.fake.scripts.get(body["model"], Script())
        if script.refusal is not None:
            return self._error(*script.refusal)
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.end_headers()
        time.sleep(script.first_s)
        for count, piece in enumerate(script.pieces[: body["max_tokens"]], start=1):
            usage = {"prompt_tokens": 1, "completion_tokens": count, "total_tokens": count + 1}
            delta = {"index": 0, "delta": {"content": piece}, "finish_reason": None}
            if count == len(script.pieces):
                delta["finish_reason"] = "stop"
            elif count == body["max_tokens"]:
                delta["finish_reason"] = "length"
            try:
                self.wfile.write(
                    f"data: {json.dumps({'choices': [delta], 'usage': usage})}\n\n".encode()
                )
            except OSError:
                return None
            if script.cut and count > len(script.pieces) // 2:
                return None
            time.sleep(script.wait_s)
        try:
            self.wfile.write(b"data: [DONE]\n\n")
        except OSError:
            return None
        key = f'secura_adapter_generation_tokens_total{{adapter="{body["model"]}"}}'
        self.fake.metrics[key] = self.fake.metrics.get(key, 0) + count
        key = f'secura_adapter_requests_total{{adapter="{body["model"]}"}}'
        self.fake.metrics[key] = self.fake.metrics.get(key, 0) + 1
        return None

    def _change(self) -> None:
        raw = self._body()
        kind = self.headers.get("content-type", "")
        body = json.loads(raw) if kind.startswith("application/json") and raw else raw
        self.fake.changes.append((self.command, self.path, body))
        if self.path.startswith("/admin/"):
            self.fake.folded = body["name"] if self.path == "/admin/fold" else None
            return self._json(200, {"folded": self.fake.folded})
        name, _, action = self.path.removeprefix("/v1/adapters/").partition("/")
        card = self.fake.find(name)
        if self.command == "PUT":
            if b"NaN" in raw:
                return self._error(400, f"{name}: U holds NaN")
            self.fake.adapters.append(adapter_card(name, versions=[], task="Uploaded."))
            return self._json(200, self.fake.adapters[-1])
        if card is None:
            return self._error(404, f"there is no adapter '{name}'")
        card = copy.deepcopy(card)
        if action == "pin":
            card["pinned"] = body["pinned"]
        elif action == "rollback":
            card |= {"digest": body["version"], "rolled_back": True}
        kept = [card if each["id"] == name else each for each in self.fake.adapters]
        if self.command == "DELETE":
            kept = [each for each in self.fake.adapters if each["id"] != name]
        self.fake.adapters = kept
        return self._json(200, card)

    def _admin(self, then: Any) -> None:
        if self.fake.plain:
            return self._error(404, "Not Found")
        if self.fake.admin_key is not None:
            if not _holds(self.headers, self.fake.admin_key):
                self._body()
                return self._error(401, "the admin routes need the key given with --admin-api-key")
        elif "via" in self.headers:
            self._body()
            return self._error(
                403, "without --admin-api-key the admin routes answer direct requests on loopback"
            )
        return then()  # type: ignore[no-any-return]

    def _user(self) -> bool:
        if self.fake.api_key is None or _holds(self.headers, self.fake.api_key):
            return True
        self._error(401, "this route needs the key given with --api-key, as a bearer token")
        return False

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("content-length", 0)))

    def _json(self, code: int, body: object) -> None:
        self._send(code, json.dumps(body).encode(), "application/json")

    def _error(self, code: int, message: str) -> None:
        self._json(code, {"error": {"message": message, "type": "refused", "code": code}})

    def _send(self, code: int, body: bytes, kind: str) -> None:
        self.send_response(code)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def _holds(headers: Message, key: str) -> bool:
    return headers.get("authorization") == f"Bearer {key}"
