"""Bodies of uploads: read up to a limit, and no further."""

from __future__ import annotations

from fastapi import Request
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException

from secura_serve.errors import LifecycleError
from secura_serve.serve.app.adapters.uploaded import UPLOADED

__all__ = ["LARGEST_BODY", "read_body", "read_files"]

LARGEST_BODY = 2**30
"""Bytes of an upload; an adapter of ours has a thousandth of that."""


def _too_large() -> LifecycleError:
    return LifecycleError(413, f"the body is larger than {LARGEST_BODY // 2**20} MiB")


async def read_body(request: Request) -> bytes:
    """Return the whole body. Raises LifecycleError (413) if it is too large."""
    parts, size = [], 0
    async for part in request.stream():
        parts.append(part)
        size += len(part)
        if size > LARGEST_BODY:
            raise _too_large()
    return b"".join(parts)


async def read_files(request: Request) -> dict[str, bytes]:
    """Return the files of a multipart body by filename.

    Raises:
        LifecycleError: (400) it cannot be read, or a file is sent twice; (411) it does not say its
            length; (413) it is too large.
    """
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise LifecycleError(
            400, f"send the files {UPLOADED[0]} and {UPLOADED[1]} as multipart/form-data"
        )
    length = request.headers.get("content-length", "")
    if not length.isdecimal():
        raise LifecycleError(411, "an upload must say its Content-Length")
    if int(length) > LARGEST_BODY:
        raise _too_large()
    # With "app" in its scope Starlette answers a malformed form itself.
    apart = Request({k: v for k, v in request.scope.items() if k != "app"}, request.receive)
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
