"""Requests that vLLM's own code stumbles over.

OpenAI's schemas allow more than vLLM handles: a refusal among the messages of ``/v1/responses``,
for instance, is an AttributeError in vLLM 0.32, which it answers with 500 as if the server had
failed. The server is well, and the next request is answered; 501 says so.
"""

from __future__ import annotations

import logging

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from secura_serve.serve.app.http.errors import error_response

__all__ = ["answer_unsupported_requests"]

# A child of vLLM's logger, which alone has a handler.
log = logging.getLogger("vllm.secura_serve")

_MISTAKES = (AttributeError, LookupError, AssertionError)
"""What code raises that meets an input it was not written for. Errors of an engine are others."""


def answer_unsupported_requests(app: FastAPI) -> None:
    """Have such a request answered with 501, and its traceback logged."""
    for kind in _MISTAKES:
        app.add_exception_handler(kind, _answer)


async def _answer(request: Request, error: Exception) -> JSONResponse:
    log.warning("%s failed inside vLLM", request.url.path, exc_info=error)
    message = f"vLLM does not support this request ({type(error).__name__}: {error})"
    return error_response(501, message, headers={"x-should-retry": "false"})
