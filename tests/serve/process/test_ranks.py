"""Proves that of two workers one may fail: the server says so, the other does not keep what it did
alone, and what is answered later belongs to what was asked.

The slow ones need vLLM on a CPU; real servers of two ranks, and of two engines, on a tiny base. The
oracle is transformers on weights folded in float64.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest

from secura_serve.method import MagNorm
from secura_serve.serve.app.adapters.workers import Workers
from tests.support import agreement, engines
from tests.support.breaking import Breaking
from tests.support.engines import random_adapter, serving

FLAGS = ("--enforce-eager", "--dtype", "float32", "--max-model-len", "256", "--max-loras", "2")
FLAGS += ("--resident", "1", "--resident-dtype", "float32")
FILES = ("adapter_config.json", "adapter_model.safetensors")


class TwoEngines:
    """vLLM's client of two engines, which answer what they are told to."""

    core_engines = (0, 1)

    def __init__(self, **answers):
        self.engine_core, self.answers, self.asked = self, answers, []

    async def _call_utility_async(self, call, method, timeout, args, kwargs, *, engine):
        assert (call, timeout, kwargs) == ("collective_rpc", None, None)
        self.asked.append((method, engine))
        return self.answers.get(method, ([None], [None]))[engine]


def test_what_any_engine_refuses_is_refused_and_no_other_keeps_it():
    engine = TwoEngines(secura_prepare=([[None]], [["no memory"]]), secura_fill=([None], ["full"]))

    async def work():
        workers = Workers(engine, dict)
        assert await workers.prepare("one", Path("folder")) == "no memory"
        assert engine.asked[2:] == [("secura_forget", 0), ("secura_forget", 1)]
        assert await workers.fill(0, Path("image"), 0, 1) == "full"

    asyncio.run(work())


def test_what_is_put_into_a_place_does_not_answer_for_what_was_there():
    """A rank may have kept what it was told to forget, where the call failed there."""
    cache = pytest.importorskip("vllm.utils.cache")
    from secura_serve.serve.engine import adapter_calls
    from secura_serve.serve.engine.deltas import DeltaModel

    registered = cache.LRUCache(8)
    for number, place in ((1, 0), (2, 1), (3, None), (4, 1)):
        registered[number] = SimpleNamespace() if place is None else DeltaModel(number, place)
    manager = SimpleNamespace(_registered_adapters=registered)
    worker = SimpleNamespace(_adapter_manager=manager, remove_adapter=registered.pop)
    adapter_calls._vacate(worker, 1)
    assert list(registered.order) == [1, 3]
    adapter_calls._vacate(worker, 1)
    assert list(registered.order) == [1, 3]


def test_slots_are_those_of_all_engines_and_of_one_rank_of_each():
    engine = TwoEngines(secura_slots=([[[4, 9], 5, 3]] * 2, [[[4, 7], 2, 1]] * 2))

    async def work():
        workers = Workers(engine, dict)
        assert await workers.resident() == {4, 7, 9}
        assert (workers.loads, workers.evictions) == (7, 4)

    asyncio.run(work())


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.parametrize("layout", ["tensor", "data"])
def test_one_of_two_workers_fails(layout, tiny_base, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    breaking = Breaking(tmp_path / "breaking")
    monkeypatch.setattr(engines, "SERVE", ["", str(breaking.launcher)])
    base, folder, content = tiny_base("qwen2"), tmp_path / "adapters", tmp_path / "new"
    for seed, name in enumerate(("one", "two", "three")):
        random_adapter(base, folder / name, r=4, seed=seed)
    for seed, name in enumerate(("full", "full-too"), 5):
        norm = MagNorm("bounded", tau=0.2)
        random_adapter(base, folder / name, r=4, seed=seed, magnorm=norm, size=8)
    random_adapter(base, content, r=4, seed=9)
    flags = (*FLAGS, f"--{layout}-parallel-size", "2")
    with (
        serving(base, folder, tmp_path / "log", *flags, cold=True) as served,
        httpx.Client(base_url=served.url.removesuffix("/v1"), timeout=60) as http,
    ):

        def upload() -> httpx.Response:
            files = [("f", (file, (content / file).read_bytes())) for file in FILES]
            return http.put("/v1/adapters/new", files=files)

        def ask(model: str) -> httpx.Response:
            return http.post("/v1/completions", json={"model": model, "prompt": "hi"})

        def right(*more: str) -> bool:
            found = agreement.compare(served, *served.names(), *more)
            return all(r.worst < 1e-4 for r in found.values())

        assert right()
        for worker in ((0, 0), (0, 1)) if layout == "tensor" else ((0, 0), (1, 0)):
            named = "worker {}-{} cannot".format(*worker)
            # What no call of its own answers for: it fails alone.
            time.sleep(1.1)
            breaking.next("slots", *worker)
            # Over a connection of its own, which the server closes then.
            failed = httpx.get(http.base_url.join("/v1/adapters"), timeout=60)
            assert failed.status_code == 500 and f"{named}: slots" in served.log.read_text()
            assert http.get("/v1/adapters").status_code == 200
            # The other worker has read it, and forgets it.
            breaking.next("read", *worker)
            refused = upload()
            assert refused.status_code == 400 and f"{named}: read" in refused.text, refused.text
            assert http.get("/v1/adapters/new").status_code == 404
            breaking.next("put", *worker)
            pinned = http.post("/v1/adapters/one/pin")
            assert pinned.status_code == 409 and f"{named}: put" in pinned.text, pinned.text
            assert ask("full").status_code == 200
            breaking.next("fill", *worker)
            unfilled = ask("full-too")
            assert unfilled.status_code >= 400 and f"{named}: fill" in unfilled.text, unfilled.text
            breaking.next("fold", *worker)
            unfolded = http.post("/admin/fold", json={"name": "full"})
            assert unfolded.status_code == 409 and f"{named}: fold" in unfolded.text, unfolded.text
            assert "the base was put back" in unfolded.text
            assert right()
            # Nothing stayed pinned: of two slots one alone may be.
            assert http.post("/v1/adapters/two/pin").status_code == 200
            assert http.post("/v1/adapters/two/pin", json={"pinned": False}).status_code == 200
            taken = upload()
            assert taken.status_code == 200 and right("new"), taken.text
            assert http.delete("/v1/adapters/new").status_code == 200
        assert served.log.read_text().count("is served as new@") == 2
