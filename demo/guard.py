"""Which requests the page's process answers: those of its own page, and only so much of them.

Gradio answers whoever reaches it. That may be a script of some site in a visitor's browser: one
that sends to this address, or one whose own name was made to point here. And it writes what it is
sent to the disk.
"""

from __future__ import annotations

import ipaddress
import re
import time
from collections import deque
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from .server import Server

__all__ = ["Guard", "is_local"]

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

API = "/gradio_api/"
UPLOAD = f"{API}upload"
DEEP_LINK = f"{API}deep_link"
"""Would write all fields of a visitor to the disk, the admin key too, and give a link to them."""
LARGEST_REQUEST = 4 * 2**20
LARGEST_UPLOADS = 2 * 2**30
KEPT_S = 4200.0
"""Uploads are deleted after an hour, which is looked at every ten minutes."""


def is_local(host: str) -> bool:
    """Return whether a host (name or address, perhaps a port) can only mean this machine."""
    parts = re.fullmatch(r"(\[[^\]]*\]|[^:\[\]]+)(:[0-9]{1,5})?", host)
    name = (parts[1] if parts else host).lower().strip("[]")
    try:
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


class Guard:
    """An ASGI app around the page's.

    Args:
        server: the one that the page asks; uploads are for its operator.
        local_only: the page has no login and listens on this machine alone, so only names of this
            machine are its own.
    """

    def __init__(self, app: Callable[..., Awaitable[None]], server: Server, local_only: bool):
        self.app, self.server, self.local_only = app, server, local_only
        self._uploads: deque[list[float]] = deque()
        """Time and bytes of each."""

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        refusal = await self._refusal(scope)
        if refusal is not None:
            return await _refuse(send, *refusal)
        length = _header(scope, "content-length")
        if scope["method"] != "POST" or not _is_upload(_path(scope)) or not length:
            return await self.app(scope, receive, send)
        entry = [time.monotonic(), float(length)]
        self._uploads.append(entry)
        came = 0

        async def counting() -> Message:
            nonlocal came
            message = await receive()
            came += len(message.get("body", b""))
            return message

        try:
            await self.app(scope, counting, send)
        finally:
            entry[1] = float(came)  # Whoever announces much and sends little has not used it up.

    async def _refusal(self, scope: Message) -> tuple[int, str] | None:
        """Return status and reason if the request is not answered."""
        host, path = _header(scope, "host"), _path(scope)
        if self.local_only and not is_local(host):
            return 421, (
                "This page has no login and answers on this machine, as localhost. To open it "
                "under another name, start it with --auth (secura-serve: --ui-auth) or --no-auth "
                "(--ui-no-auth)."
            )
        if path.startswith(DEEP_LINK):
            return 404, "Not found."
        writes = scope["method"] not in ("GET", "HEAD", "OPTIONS")
        if not writes and not path.startswith(API):
            return None
        # Browsers say whose script asks; what is no browser does not.
        if _header(scope, "sec-fetch-site") not in ("", "same-origin", "none"):
            return 403, "This is asked by another site than the page's."
        return await self._too_much(scope, path) if writes else None

    async def _too_much(self, scope: Message, path: str) -> tuple[int, str] | None:
        length = _header(scope, "content-length")
        if not length.isdecimal():
            return (411, "How long is it?") if _header(scope, "transfer-encoding") else None
        if not _is_upload(path):
            return (413, "Too large.") if int(length) > LARGEST_REQUEST else None
        if (await self.server.snapshot()).operator != "key":
            return 403, "The server takes no changes through this page."
        while self._uploads and self._uploads[0][0] < time.monotonic() - KEPT_S:
            self._uploads.popleft()
        if sum(size for _, size in self._uploads) + int(length) > LARGEST_UPLOADS:
            return 413, "Too much was uploaded within the last hour: send it to the server itself."
        return None


def _is_upload(path: str) -> bool:
    return path.rstrip("/") == UPLOAD


def _path(scope: Message) -> str:
    return str(scope["path"])


def _header(scope: Message, name: str) -> str:
    found = [value for key, value in scope["headers"] if key == name.encode()]
    return str(found[0].decode("latin-1")) if found else ""


async def _refuse(send: Send, status: int, text: str) -> None:
    body = text.encode()
    headers = [(b"content-type", b"text/plain"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
