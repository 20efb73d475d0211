"""Errors as OpenAI's API answers them, which its clients turn into typed exceptions."""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse

__all__ = ["answer_http_errors", "error_body", "error_response"]

_KINDS = {
    400: "BadRequestError",
    401: "AuthenticationError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
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
    kind = kind or _KINDS.get(status) or HTTPStatus(status).phrase
    return {"error": {"message": message, "type": kind, "param": param, "code": status}}


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


def answer_http_errors(app: Starlette) -> None:
    """Have Starlette's own errors answered in this shape: an unknown path, a method not allowed.

    vLLM does so for FastAPI's errors and for bodies that are not valid. Those of the router are of
    a class that it does not cover, and would be answered with ``{"detail": "Not Found"}``.
    """
    app.add_exception_handler(HTTPException, _answer)


async def _answer(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    asked = f"{request.method} {request.url.path[:200]}"
    return error_response(error.status_code, f"{error.detail}: {asked}", headers=error.headers)
