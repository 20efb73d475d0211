"""A small HTTP server that takes adapters as secura-serve does and keeps what arrived."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.parser import BytesParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from safetensors.torch import load

Answer = tuple[int, Any]


@dataclass
class Receiver:
    """What arrived, and what to answer instead of taking it."""

    url: str = ""
    requests: list[tuple[str, dict[str, str], bytes]] = field(default_factory=list)
    """Path, headers (lower case) and body."""
    bases: dict[str, str] = field(default_factory=dict)
    """Name -> the basis on which U alone is taken; the test sets it, as only it knows the base."""
    refusals: list[Answer] = field(default_factory=list)
    """Answers of the next requests, in their order."""

    def answer(self, path: str, headers: dict[str, str], body: bytes) -> Answer:
        """Do what the contract of the adapter API says."""
        if self.refusals:
            return self.refusals.pop(0)
        name = path.removeprefix("/v1/adapters/").removesuffix("/weights")
        if path.endswith("/weights"):
            if name not in self.bases:
                return 404, error(f"no adapter {name}")
            if self.bases[name] != headers["x-secura-basis"]:
                return 409, error(f"{name} has another basis")
            load(body)
        return 200, {"id": name, "digest": hashlib.sha256(body).hexdigest()[:32]}

    def paths(self) -> list[str]:
        return [path for path, _, _ in self.requests]


def error(message: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "invalid_request_error"}}


def parts(headers: dict[str, str], body: bytes) -> dict[str, bytes]:
    """The files of a multipart body, by their file names."""
    head = f"Content-Type: {headers['content-type']}\r\n\r\n".encode()
    message = BytesParser().parsebytes(head + body)
    made: dict[str, bytes] = {}
    for part in message.get_payload():  # type: ignore[union-attr]
        content = part.get_payload(decode=True)  # type: ignore[union-attr]
        made[str(part.get_filename())] = content  # type: ignore[union-attr, assignment]
    return made


@contextmanager
def receiving() -> Iterator[Receiver]:
    """A receiver on a free port of this machine."""
    receiver = Receiver()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_PUT(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            headers = {key.lower(): value for key, value in self.headers.items()}
            receiver.requests.append((self.path, headers, body))
            status, said = receiver.answer(self.path, headers, body)
            text = said.encode() if isinstance(said, str) else json.dumps(said).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        receiver.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield receiver
        server.shutdown()
        thread.join()
