"""Proves that no request made from the server's own OpenAPI description breaks it: no status 5xx
but 501 and 503, no dead process, no answer of another model than the one that was named.

Needs vLLM on a CPU, a tiny base and schemathesis. One server on loopback with the optional routes
that environment variables switch on, but for vLLM's development mode: its routes stop the engine or
move weights as they are told, and answer 500 where they are told nonsense. The number of requests
is fixed.
"""

from __future__ import annotations

import json

import httpx
import psutil
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.support.engines import random_adapter, serving

pytestmark = pytest.mark.engine
REQUESTS = 2000
NAMES = st.sampled_from(["base", "one", "bounded", "nobody", "../one", "", "one*2", "BASE", "\0"])
SWITCHES = ("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "VLLM_ENABLE_RESPONSES_API_STORE")


@pytest.fixture(scope="module")
def server(tiny_base, tmp_path_factory):
    root = tmp_path_factory.mktemp("fuzz")
    base, folder = tiny_base("llama"), root / "adapters"
    random_adapter(base, folder / "one", r=8, seed=1)
    random_adapter(base, folder / "bounded", r=8, seed=3)
    flags = ("--enforce-eager", "--max-model-len", "128", "--served-model-name", "base")
    with pytest.MonkeyPatch.context() as patch:
        for name in SWITCHES:
            patch.setenv(name, "1")
        patch.setenv("VLLM_MAX_N_SEQUENCES", "4")
        with serving(base, folder, root / "log", *flags) as server:
            yield server


def _named(case, name):
    """Put a model's name where the generator would hardly ever put one."""
    if isinstance(case.body, dict) and "model" in case.body:
        case.body["model"] = name


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_thousand_requests_to_all_routes(server):
    root = server.url.removesuffix("/v1")
    schema = schemathesis.openapi.from_url(f"{root}/openapi.json")
    operations = [r.ok() for r in schema.get_all_operations()]
    assert len(operations) > 20, [o.path for o in operations]
    # Without a body there are few different requests. Some that are made cannot be sent.
    each = 3 * REQUESTS // (2 * sum(bool(list(o.body)) for o in operations))
    process = psutil.Process(server.pid)
    children = {child.pid for child in process.children(recursive=True)}
    sent, problems = 0, []
    with httpx.Client(base_url=root, timeout=120) as client:
        for operation in operations:

            @settings(
                max_examples=each,
                deadline=None,
                database=None,
                derandomize=True,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            @given(case=operation.as_strategy(), name=NAMES)
            def ask(case, name):
                nonlocal sent
                _named(case, name)
                faults = _ask(client, case)
                sent += faults is not None
                problems.extend(faults or ())

            ask()
    assert not problems, "\n".join(problems[:20])
    assert sent >= REQUESTS
    assert {child.pid for child in process.children(recursive=True)} >= children
    answer = httpx.post(f"{root}/v1/completions", json={"model": "one", "prompt": "x"}, timeout=60)
    assert answer.status_code == 200 and answer.json()["model"] == "one"


def _ask(client, case):
    """Send one request; return what is wrong with the answer, or None if it cannot be sent."""
    try:
        sent = case.as_transport_kwargs(base_url=str(client.base_url))
        response = case.call(base_url=str(client.base_url), timeout=120)
    except (ValueError, TypeError):
        return None
    shown = f"{case.method} {case.path} {str(sent.get('json') or sent.get('data'))[:300]}"
    if response.status_code >= 500 and response.status_code not in (501, 503):
        return [f"{shown}: {response.status_code} {response.text[:300]}"]
    try:
        answered = json.loads(response.content).get("model")
    except (ValueError, AttributeError):
        return []
    asked = case.body.get("model") if isinstance(case.body, dict) else None
    if response.status_code == 200 and asked and answered not in (None, asked):
        return [f"{shown}: answered as {answered!r}"]
    return []
