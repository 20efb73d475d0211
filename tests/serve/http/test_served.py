"""Proves what a user of the endpoint relies on, with the shipped adapters on the real base.

Needs vLLM on a CPU and the embedded base; one float32 server (fixture ``served``), the ``openai``
client, no mocks.
"""

from __future__ import annotations

import json
from pathlib import Path

import openai
import pytest

from tests.support import agreement

QUESTION = [{"role": "user", "content": "Name the capital of France."}]


@pytest.fixture
def client(served):
    return openai.OpenAI(base_url=served.url, api_key="none")


def test_logprobs_of_base_and_shipped_adapters_in_one_mixed_batch(served):
    found = agreement.compare(served, tokens=8)
    assert len(found) >= 4
    for name, result in found.items():
        assert result.worst < 1e-4, (name, result)
        assert result.greedy == len(agreement.PROMPTS), (name, result)
        assert name == served.base or result.moved > 0.1, (name, result)


def test_models_lists_the_base_and_its_adapters(served, client):
    models = {m.id: m for m in client.models.list()}
    shipped = {p.parent.name for p in Path("adapters").glob("*/adapter_config.json")}
    assert set(models) == {"smollm2-135m"} | shipped
    assert models["smollm2-135m"].parent is None
    assert {models[name].parent for name in shipped} == {"smollm2-135m"}


def test_unknown_model_is_404_in_openai_shape(client):
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="no-such-adapter", messages=QUESTION)
    error = caught.value.body
    assert error["type"] == "NotFoundError" and error["code"] == 404
    assert "no-such-adapter" in error["message"]


def test_streaming_reports_usage(served, client):
    for name in served.names():
        chunks = list(
            client.chat.completions.create(
                model=name,
                messages=QUESTION,
                max_tokens=8,
                temperature=0,
                stream=True,
                stream_options={"include_usage": True},
            )
        )
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        assert text
        assert chunks[-1].usage.completion_tokens <= 8
        assert {c.model for c in chunks} == {name}


def test_structured_output_through_an_adapter(served, client):
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}},
        "required": ["city"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        model=served.adapters[0],
        messages=QUESTION,
        max_tokens=60,
        temperature=0,
        response_format={"type": "json_schema", "json_schema": {"name": "c", "schema": schema}},
    )
    assert set(json.loads(answer.choices[0].message.content)) == {"city"}


def test_tool_call_through_an_adapter(served, client):
    parameters = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}},
        "required": ["city"],
        "additionalProperties": False,
    }
    function = {"name": "weather", "parameters": parameters, "strict": True}
    answer = client.chat.completions.create(
        model=served.adapters[0],
        messages=QUESTION,
        tools=[{"type": "function", "function": function}],
        tool_choice={"type": "function", "function": {"name": "weather"}},
        max_tokens=60,
        temperature=0,
    )
    call = answer.choices[0].message.tool_calls[0]
    assert call.function.name == "weather"
    assert set(json.loads(call.function.arguments)) == {"city"}


def test_an_adapter_does_not_answer_from_the_base_s_prefix_cache(served, client):
    """The same long prompt for each model in turn, twice: cached keys must not mix models."""

    def ask(name):
        prompt = "The quick brown fox jumps over the lazy dog. " * 20
        answer = client.completions.create(
            model=name, prompt=prompt, max_tokens=1, temperature=0, logprobs=5
        )
        return answer.choices[0].logprobs.top_logprobs[0]

    first, again = ([ask(name) for name in served.names()] for _ in range(2))
    for one, two in zip(first, again, strict=True):
        assert one == pytest.approx(two, abs=1e-4)
    assert all(one != first[0] for one in first[1:])


def test_binds_loopback_only(served):
    port = int(served.url.rsplit(":", 1)[1].split("/")[0])
    listening = {
        line.split()[1]
        for table in ("/proc/net/tcp", "/proc/net/tcp6")
        for line in Path(table).read_text().splitlines()[1:]
        if line.split()[3] == "0A" and line.split()[1].endswith(f":{port:04X}")
    }
    assert listening == {f"0100007F:{port:04X}"}


def test_start_prints_endpoint_table_and_memory(served):
    log = served.log.read_text()
    for name in served.adapters:
        assert name in log
    assert "STATUS" in log and "memory: base 5" in log and "KV cache 1 GiB" in log
    assert served.url in log
