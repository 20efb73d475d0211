"""Proves that a request which vLLM's own code stumbles over is told from a failing server.

Needs starlette and FastAPI only.
"""

from __future__ import annotations

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from secura_serve.serve.app.http.unsupported import answer_unsupported_requests


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (AttributeError("'Refusal' object has no attribute 'text'"), 501),
        (KeyError("text"), 501),
        (IndexError("list index out of range"), 501),
        (RuntimeError("out of memory"), 500),
    ],
)
def test_what_the_code_was_not_written_for_is_501_and_a_failure_stays_500(error, status):
    app = FastAPI()

    @app.post("/v1/responses")
    async def fail():
        raise error

    answer_unsupported_requests(app)
    answer = TestClient(app, raise_server_exceptions=False).post("/v1/responses")
    assert answer.status_code == status
    if status == 501:
        assert str(error) in answer.json()["error"]["message"]
