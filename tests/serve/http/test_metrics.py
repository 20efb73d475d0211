"""Proves what the server counts: by adapter, with a bounded number of labels, and shown on
``/metrics`` beside vLLM's.

The counting itself is tested with an engine that is an async generator (needs vLLM installed,
starts nothing); the last test asks the shared server (fixture ``served``).
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import urllib.request
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import openai
import pytest

from secura_serve.errors import LifecycleError, SecuraError, UnservableError
from secura_serve.serve.app.adapters.library import Library
from secura_serve.serve.app.adapters.residency import Residency
from secura_serve.serve.app.adapters.workers import Workers
from secura_serve.serve.app.metrics import LIMIT, OTHER, Metrics
from secura_serve.serve.app.scrape import AdapterStates

prometheus = pytest.importorskip("prometheus_client")


@pytest.fixture
def registry() -> Any:
    return prometheus.CollectorRegistry()


@pytest.fixture
def metrics(registry: Any) -> Metrics:
    return Metrics(registry)


def test_adapters_beyond_the_limit_share_one_label(metrics: Metrics, registry: Any) -> None:
    for i in range(LIMIT + 50):
        metrics.of_adapter(f"a{i}").requests.inc()
    metrics.of_adapter("a0").requests.inc()
    value = registry.get_sample_value
    assert value("secura_adapter_requests_total", {"adapter": "a0"}) == 2
    assert value("secura_adapter_requests_total", {"adapter": OTHER}) == 50
    samples = [
        s
        for family in registry.collect()
        for s in family.samples
        if s.name == "secura_adapter_requests_total"
    ]
    assert len(samples) == LIMIT + 1


def test_refusals_are_counted_by_the_class_of_the_error(metrics: Metrics, registry: Any) -> None:
    class Unlisted(SecuraError):
        pass

    for error in (UnservableError("x"), LifecycleError(409, "x"), Unlisted("x"), SecuraError("x")):
        metrics.adapter_refused(error)
    counts = {
        reason: registry.get_sample_value("secura_adapter_refusals_total", {"reason": reason})
        for reason in ("UnservableError", "LifecycleError", "SecuraError", "Unlisted")
    }
    assert counts == {"UnservableError": 1, "LifecycleError": 1, "SecuraError": 2, "Unlisted": None}


class FakeEngine:
    """Answers with two tokens of each of two samples, one token at a time."""

    def __init__(self) -> None:
        self.closed = 0

    async def generate(
        self, prompt: Any, sampling_params: Any, request_id: str, *, lora_request: Any = None
    ) -> AsyncIterator[Any]:
        from vllm.sampling_params import RequestOutputKind

        try:
            for step in (1, 2):
                new = [7] if sampling_params.output_kind is RequestOutputKind.DELTA else [7] * step
                yield SimpleNamespace(
                    prompt_token_ids=[1, 2, 3],
                    metrics=SimpleNamespace(first_token_latency=0.2),
                    outputs=[SimpleNamespace(index=i, token_ids=new) for i in (0, 1)],
                )
        finally:
            self.closed += 1

    async def encode(
        self, prompt: Any, pooling_params: Any, request_id: str, lora_request: Any = None
    ) -> AsyncIterator[Any]:
        yield SimpleNamespace(prompt_token_ids=[1, 2, 3, 4])


@pytest.mark.parametrize("kind", ["DELTA", "CUMULATIVE"])
def test_tokens_are_counted_once_however_they_are_sent(
    metrics: Metrics, registry: Any, kind: str
) -> None:
    vllm = pytest.importorskip("vllm.sampling_params", reason="vLLM is not installed")
    from secura_serve.serve.app.request_counts import count_requests

    engine: Any = FakeEngine()
    count_requests(engine, metrics, lambda: "base")
    params = SimpleNamespace(output_kind=vllm.RequestOutputKind[kind])

    async def ask() -> None:
        lora = SimpleNamespace(lora_name="x")
        assert len([a async for a in engine.generate("p", params, "1", lora_request=lora)]) == 2
        # A client that goes away after the first token: what was sent counts, and vLLM is told.
        stream = engine.generate("p", params, "2")
        await anext(stream)
        await stream.aclose()
        assert [a async for a in engine.encode("p", None, "3", lora)]

    asyncio.run(ask())
    assert engine.closed == 2

    def value(what: str, adapter: str) -> float | None:
        return registry.get_sample_value(f"secura_adapter_{what}", {"adapter": adapter})  # type: ignore[no-any-return]

    assert (value("requests_total", "x"), value("requests_total", "base")) == (2, 1)
    assert (value("prompt_tokens_total", "x"), value("prompt_tokens_total", "base")) == (7, 3)
    assert (value("generation_tokens_total", "x"), value("generation_tokens_total", "base")) == (
        4,
        2,
    )
    assert value("time_to_first_token_seconds_count", "x") == 1
    assert value("time_to_first_token_seconds_sum", "x") == pytest.approx(0.2)


def test_a_scrape_does_not_wait_for_an_engine_that_does_not_answer(
    metrics: Metrics, registry: Any
) -> None:
    library = Library(["base"])
    library.refuse("bad", "it is damaged")
    answer = asyncio.Event()

    class Engine:
        engine_core = SimpleNamespace(core_engines=(0,))
        asked = 0

        async def collective_rpc(self, method: str, args: Any = ()) -> list[Any]:
            assert method == "secura_slots"
            self.asked += 1
            await answer.wait()
            return [([4, 9], 5, 3)]

    async def scrape() -> None:
        engine = Engine()
        residency = Residency()
        residency.workers = Workers(engine, dict)
        updates: Any = SimpleNamespace(library=library, residency=residency)
        states = AdapterStates(metrics, updates, SimpleNamespace(busy=False))  # type: ignore[arg-type]
        loop = asyncio.get_running_loop()
        begin = loop.time()
        await states.refresh()
        await states.refresh()
        assert loop.time() - begin < 2 and engine.asked == 1
        assert registry.get_sample_value("secura_adapters", {"state": "refused"}) == 1
        assert registry.get_sample_value("secura_adapters", {"state": "resident"}) is None
        answer.set()
        for _ in range(5):
            await states.refresh()
        assert engine.asked == 1
        assert registry.get_sample_value("secura_adapters", {"state": "resident"}) == 2
        assert registry.get_sample_value("secura_adapter_loads_total") == 5
        assert registry.get_sample_value("secura_adapter_evictions_total") == 3

    asyncio.run(scrape())


def test_values_of_several_processes_are_added_up(tmp_path: Any) -> None:
    code = (
        "from secura_serve.serve.app.metrics import Metrics\n"
        "m = Metrics(); m.of_adapter('x').requests.inc(2); m.set_adapters(known=3)"
    )
    env = {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path), "PYTHONPATH": ":".join(sys.path)}
    for _ in range(2):
        subprocess.run([sys.executable, "-c", code], check=True, env=env)
    registry = prometheus.CollectorRegistry()
    from prometheus_client import multiprocess

    multiprocess.MultiProcessCollector(registry, str(tmp_path))
    value = registry.get_sample_value
    assert value("secura_adapter_requests_total", {"adapter": "x"}) == 4
    assert value("secura_adapters", {"state": "known"}) == 3


def _scrape(served: Any) -> dict[tuple[str, str], float]:
    """Return (sample's name, value of its label) -> value, of a running server."""
    from prometheus_client.parser import text_string_to_metric_families

    with urllib.request.urlopen(served.url.removesuffix("/v1") + "/metrics") as answer:
        text = answer.read().decode()
    return {
        (s.name, s.labels.get("adapter") or s.labels.get("state") or ""): s.value
        for family in text_string_to_metric_families(text)
        for s in family.samples
        if s.name.startswith("secura_") and "le" not in s.labels
    }


def test_a_running_server_counts_what_it_is_asked(served: Any) -> None:
    name = served.adapters[0]
    before = _scrape(served)
    client = openai.OpenAI(base_url=served.url, api_key="none")
    answer = client.completions.create(model=name, prompt="One two", max_tokens=5)
    streamed = 0
    for chunk in client.completions.create(
        model=served.base,
        prompt="One two",
        max_tokens=4,
        stream=True,
        stream_options={"include_usage": True},
    ):
        streamed = chunk.usage.completion_tokens if chunk.usage else streamed
    after = _scrape(served)

    def grown(what: str, adapter: str) -> float:
        key = (f"secura_adapter_{what}", adapter)
        return after[key] - before.get(key, 0)

    assert answer.usage is not None and streamed
    assert grown("requests_total", name) == grown("requests_total", served.base) == 1
    assert grown("prompt_tokens_total", name) == answer.usage.prompt_tokens
    assert grown("generation_tokens_total", name) == answer.usage.completion_tokens
    assert grown("generation_tokens_total", served.base) == streamed
    for model in (name, served.base):
        assert grown("time_to_first_token_seconds_count", model) == 1
        assert grown("time_to_first_token_seconds_sum", model) > 0
    shipped = sum(1 for _ in served.folder.glob("*/adapter_config.json"))
    assert after["secura_adapters", "known"] == after["secura_adapter_versions", ""] == shipped
    assert after["secura_adapters", "refused"] == 0
    # The adapter that was asked has a slot, and has been put there; full-rank ones have places.
    loaded = after["secura_adapter_loads_total", ""] + after["secura_places", "filled"]
    assert 1 <= after["secura_adapters", "resident"] <= loaded
    for other in served.adapters:
        client.completions.create(model=other, prompt="One two", max_tokens=1)
    after = _scrape(served)
    # A full-rank adapter is not read, its place is filled.
    made = ("secura_adapter_load_seconds_count", "secura_place_fill_seconds_count")
    assert sum(after[name, ""] for name in made) >= len(served.adapters)
