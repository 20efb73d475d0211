"""Errors as OpenAI's API answers them, which its clients turn into typed exceptions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse

__all__ = ["error_body", "error_response"]

_KINDS = {
    400: "BadRequestError",
    401: "AuthenticationError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    409: "ConflictError",
    411: "BadRequestError",
    413: "BadRequestError",
    501: "NotImplementedError",
    503: "ServiceUnavailableError",
    507: "InsufficientStorageError",
}


def error_body(
    status: int, message: str, *, param: str | None = None, kind: str | None = None
) -> dict[str, Any]:
    """Return ``{"error": {...}}``.

    Args:
        param: the field of the request that is at fault.
        kind: what to call the error; by default what its status is called.
    """
    error = {"message": message, "type": kind or _KINDS[status], "param": param, "code": status}
    return {"error": error}


def error_response(
    status: int,
    message: str,
    *,
    param: str | None = None,
    kind: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    """Return :func:`error_body` as a response."""
    return JSONResponse(error_body(status, message, param=param, kind=kind), status, headers)
