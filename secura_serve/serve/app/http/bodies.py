"""Bodies of requests: read up to a limit and no further, and only while they come."""

from __future__ import annotations

import asyncio

from fastapi import Request
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive

from secura_serve.errors import LifecycleError
from secura_serve.serve.app.adapters.content.uploaded import UPLOADED

__all__ = ["LARGEST_REQUEST", "LARGEST_UPLOAD", "read_body", "read_files", "read_upload"]

LARGEST_REQUEST = 2**27
"""Bytes of a request for answers. A body takes a few times its size while it is read."""
LARGEST_UPLOAD = 2**30
"""Bytes of an upload; an adapter of ours has a thousandth of that."""

STALLED_S = 60.0
"""Seconds without a byte after which a client is given up, as nginx does (client_body_timeout)."""


def _while_it_comes(receive: Receive) -> Receive:
    """Return a ``receive`` that raises LifecycleError (408) once nothing has come for too long."""

    async def received() -> Message:
        try:
            return await asyncio.wait_for(receive(), STALLED_S)
        except TimeoutError:
            raise LifecycleError(408, f"no more of the body came for {STALLED_S:g} s") from None

    return received


def _too_large(largest: int) -> LifecycleError:
    return LifecycleError(413, f"the body is larger than {largest // 2**20} MiB")


async def read_body(receive: Receive, largest: int) -> bytes | None:
    """Return the whole body; None if the client went away.

    Raises:
        LifecycleError: (413) it has more than ``largest`` bytes; the rest has not been read; (408)
            the client stopped sending.
    """
    parts, size = [], 0
    while True:
        message = await _while_it_comes(receive)()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > largest:
            raise _too_large(largest)
        if not message.get("more_body"):
            return b"".join(parts)


async def read_upload(request: Request) -> bytes:
    """Return the whole body of an upload.

    Raises:
        LifecycleError: (413) it is too large; (408) the client stopped sending.
        ClientDisconnect: the client went away.
    """
    body = await read_body(request.receive, LARGEST_UPLOAD)
    if body is None:
        raise ClientDisconnect
    return body


async def read_files(request: Request) -> dict[str, bytes]:
    """Return the files of a multipart body by filename.

    Raises:
        LifecycleError: (400) it cannot be read, or a file is sent twice; (411) it does not say its
            length; (413) it is too large; (408) the client stopped sending.
    """
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise LifecycleError(
            400, f"send the files {UPLOADED[0]} and {UPLOADED[1]} as multipart/form-data"
        )
    length = request.headers.get("content-length", "")
    if not length.isdecimal():
        raise LifecycleError(411, "an upload must say its Content-Length")
    if int(length) > LARGEST_UPLOAD:
        raise _too_large(LARGEST_UPLOAD)
    # With "app" in its scope Starlette answers a malformed form itself.
    apart = Request(
        {k: v for k, v in request.scope.items() if k != "app"}, _while_it_comes(request.receive)
    )
    files: dict[str, bytes] = {}
    try:
        async with apart.form(max_files=len(UPLOADED), max_fields=0) as form:
            for _, part in form.multi_items():
                if isinstance(part, UploadFile):
                    name = part.filename or ""
                    if name in files:
                        raise LifecycleError(400, f"{name[:80]!r} is sent twice")
                    files[name] = await part.read()
    except (MultiPartException, ValueError, KeyError) as error:
        raise LifecycleError(400, f"the multipart body cannot be read: {error}") from error
    return files
