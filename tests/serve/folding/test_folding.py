"""Proves a fold in the running server: right weights, nobody sees half of one, and back again.

Needs vLLM on a CPU; real servers on tiny bases, the ``openai`` client. The oracle is transformers
on weights folded in float64.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, replace
from types import SimpleNamespace

import openai
import pytest
import torch
from safetensors.torch import load_file, save_file

from secura_serve import adapter as A
from secura_serve.bases import cache_root
from secura_serve.errors import ConfigError, FoldError
from secura_serve.method import MagNorm
from secura_serve.serve.app.adapters.content.plain_lora import PlainLoRA
from secura_serve.serve.app.adapters.content.snapshots import Snapshot, SnapshotStore
from secura_serve.serve.app.adapters.content.verifier import Entry
from secura_serve.serve.app.adapters.library import Library, Version
from secura_serve.serve.app.answers import Answers
from secura_serve.serve.app.folding import Folding
from tests.support import agreement
from tests.support.engines import random_adapter, serving
from tests.support.lifecycle import house

FLAGS = ("--enforce-eager", "--dtype", "float32", "--max-model-len", "256", "--resident", "0")
BOUNDED = MagNorm("bounded", tau=0.2)


@dataclass
class Operator:
    """The admin routes over plain HTTP."""

    url: str
    headers: dict[str, str]

    def __call__(self, path, body=None, method="POST", **headers):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self.url.removesuffix("/v1") + path,
            data if method == "GET" else data or b"",
            {"Content-Type": "application/json"} | self.headers | headers,
            method=method,
        )
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def until_held(self, fold):
        """Wait until the fold that the thread ``fold`` asked for holds new requests."""
        while not self("/admin/fold", method="GET")[1]["holding"]:
            assert fold.is_alive(), "the fold is over, and held nobody"
            time.sleep(0.01)


@pytest.fixture(scope="module")
def served(tiny_base, tmp_path_factory):
    root = tmp_path_factory.mktemp("folding")
    base, folder = tiny_base("qwen2"), root / "adapters"
    random_adapter(base, folder / "all", r=8, seed=1)
    random_adapter(base, folder / "q-and-v", r=16, seed=2, only=("q_proj", "v_proj"))
    random_adapter(base, folder / "bounded", r=8, seed=3, magnorm=BOUNDED, size=20)
    _save_wild(base, folder / "wild")
    with serving(base, folder, root / "log", *FLAGS) as server:
        yield server


def _save_wild(base, target):
    """An adapter that passes every check and cannot be folded: finite as it stands on disk,
    infinite once it is multiplied out, and not in the first layer."""
    wild = A.load(random_adapter(base, target, r=8, seed=4))
    next(cur for name, cur in wild.modules.items() if "layers.1.mlp" in name).U.fill_(3e38)
    modules = {name: replace(cur, rho_max=1.0) for name, cur in wild.modules.items()}
    config = replace(wild.config, magnorm=MagNorm("published"))
    A.save(target, config, modules, overwrite=True)


@pytest.fixture
def operator(served):
    ready = Operator(served.url, {})
    yield ready
    ready("/admin/unfold")


@pytest.fixture
def client(served):
    return openai.OpenAI(base_url=served.url, api_key="none", max_retries=0)


def statuses(client):
    return {m.id: m.status for m in client.models.list()}


def logprobs(client, name):
    """One answer to a prompt that is long enough to be cached."""
    answer = client.completions.create(
        model=name,
        prompt="The quick brown fox jumps over the lazy dog. " * 12,
        max_tokens=4,
        temperature=0,
        logprobs=5,
    )
    return answer.choices[0].logprobs.top_logprobs


def assert_close(got, want):
    got, want = (torch.tensor([list(p.values()) for p in x]) for x in (got, want))
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)


def test_an_unfolded_s_magnorm_adapter_is_listed_and_refused_with_the_hint(served, client):
    found = statuses(client)
    assert found.pop("bounded") == "unfolded" and found.pop("wild") == "unfolded"
    assert set(found) == {served.base, "all", "q-and-v"} and {*found.values()} == {"ready"}
    with pytest.raises(openai.ConflictError, match="--fold bounded"):
        client.completions.create(model="bounded", prompt="x")


def test_folded_switched_and_unfolded_weights(served, operator, client):
    models = (served.base, "all", "q-and-v")
    before = {name: logprobs(client, name) for name in models}
    for name in ("bounded", "q-and-v", "all"):
        status, done = operator("/admin/fold", {"name": name})
        assert status == 200 and done["folded"] == name and done["changed"], done
        result = agreement.compare(served, name)[name]
        assert result.worst < 1e-4 and result.greedy == len(agreement.PROMPTS), (name, result)
        assert result.moved > 0.1
        folded = logprobs(client, name)
        for other in models:
            assert folded != before[other] or other == name
        if name in before:
            # The same adapter chosen per request computes the same, in another order.
            assert_close(folded, before[name])
    status, done = operator("/admin/unfold")
    assert (status, done["folded"], done["changed"]) == (200, None, True)
    assert {name: logprobs(client, name) for name in models} == before
    assert operator("/admin/unfold") == (200, {"folded": None, "changed": False})


def test_while_folded_everything_else_gets_409_with_the_way_out(served, operator, client):
    assert operator("/admin/fold", {"name": "bounded"})[0] == 200
    assert operator("/admin/fold", {"name": "bounded"})[1] == {
        "folded": "bounded",
        "changed": False,
    }
    found = statuses(client)
    assert found.pop("bounded") == "folded" and {*found.values()} == {"blocked"}
    assert operator("/admin/fold", method="GET")[1]["folded"] == "bounded"
    question = [{"role": "user", "content": "hello"}]
    for name in (served.base, "all", "wild"):
        with pytest.raises(openai.ConflictError, match="bounded is folded.*/admin/unfold"):
            client.chat.completions.create(model=name, messages=question)
    for body in ({"prompt": "x"}, {"prompt": "x", "model": None}, {"model": ""}):
        assert operator("/v1/completions", body)[0] == 409
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="unknown", prompt="x")
    answer = client.chat.completions.create(model="bounded", messages=question, max_tokens=4)
    assert answer.model == "bounded"


def slowly(client, model, stream=True):
    """A request that takes seconds: many prompts, each to the end of the context.

    As a stream it stays inside until it is read, however fast the machine: so many logprobs
    (6 MB) are more than the two ends of a connection hold, once the client's may not grow.
    """
    answer = client.completions.create(
        model=model,
        prompt=["Once upon"] * 40,
        max_tokens=240,
        temperature=0,
        stream=stream,
        logprobs=20 if stream else None,
        extra_body={"ignore_eos": True},
    )
    if stream:
        _receive(answer, 2**14)
    return answer


def _receive(stream, size):
    """Let the client's end of a stream's connection hold so many bytes."""
    connection = stream.response.extensions["network_stream"].get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size)


def test_running_requests_finish_first_and_new_ones_see_the_new_weights(served, operator, client):
    alone = [choice.text for choice in slowly(client, served.base, stream=False).choices]
    stream = slowly(client, served.base)
    pieces = [next(stream).choices[0]]
    status, answer = operator("/admin/fold", {"name": "bounded", "timeout": 0.05})
    assert status == 409 and "running requests (1) took longer" in answer["error"]["message"]
    done = {}
    folding = threading.Thread(
        target=lambda: done.update(
            fold=operator("/admin/fold", {"name": "bounded", "timeout": 300})
        )
    )
    folding.start()
    operator.until_held(folding)
    # On a busy machine it is held for too long, and told to try again.
    patient = client.with_options(max_retries=9)
    held = threading.Thread(target=lambda: done.update(held=logprobs(patient, "bounded")))
    refused = threading.Thread(
        target=lambda: done.update(
            refused=operator("/v1/completions", {"model": served.base, "prompt": "x"})[0]
        )
    )
    held.start()
    refused.start()
    assert operator("/admin/fold", method="GET")[1]["folded"] is None
    status, answer = operator("/admin/fold", {"name": "all", "timeout": 0.1})
    assert status == 409 and "another fold was still under way" in answer["error"]["message"]
    _receive(stream, 2**22)
    pieces += [chunk.choices[0] for chunk in stream]
    for thread in (folding, held, refused):
        thread.join(timeout=120)
    texts = [""] * len(alone)
    for piece in pieces:
        texts[piece.index] += piece.text
    assert texts == alone
    assert done["fold"][0] == 200 and done["refused"] == 409
    # The second one finds the first one's prompt in the cache, so not to the last bit.
    assert_close(done["held"], logprobs(client, "bounded"))


@pytest.mark.parametrize(
    ("name", "said"),
    [("base", "/admin/unfold puts it back"), ("lora", "a plain LoRA"), ("x", "no adapter 'x'")],
)
def test_what_cannot_be_folded_is_told_from_what_is_not_there(name, said, tmp_path):
    path = tmp_path / "copies" / "0" / "lora"
    lora = PlainLoRA(path, 4, {"model.layers.0.self_attn.q_proj": 4})
    snapshot = Snapshot(path, tmp_path / "lora", "0" * 32, ())
    library = Library(["base"])
    library.add(Version(Entry("lora", None, lora=lora, snapshot=snapshot), 1, "folder", 0.0))
    folding = Folding(tmp_path, Answers(["base"], library))
    with pytest.raises(ConfigError, match=said):
        asyncio.run(folding.change(name))


def test_a_fold_that_fails_midway_puts_the_base_back(served, operator, client):
    before = logprobs(client, served.base)
    assert operator("/admin/fold", {"name": "bounded"})[0] == 200
    status, answer = operator("/admin/fold", {"name": "wild"})
    assert status == 409 and "the base was put back" in answer["error"]["message"], answer
    assert "layers.1.mlp" in answer["error"]["message"]
    assert statuses(client)[served.base] == "ready"
    assert logprobs(client, served.base) == before
    assert agreement.compare(served, "all")["all"].worst < 1e-4


def test_bad_requests_to_the_admin_routes(served, operator):
    assert operator("/admin/fold", {"name": "nobody"})[0] == 404
    assert operator("/admin/fold", {})[0] == 400
    assert operator("/admin/fold", {"name": "all", "surprise": 1})[0] == 400
    for timeout in (-1, True, "1", 1e9):
        assert operator("/admin/fold", {"name": "all", "timeout": timeout})[0] == 400
    # A web page, and a proxy in front: not the operator.
    for strange in (
        {"Origin": "http://evil.example"},
        {"X-Forwarded-For": "127.0.0.1"},
        {"Sec-Fetch-Site": "cross-site"},
    ):
        assert operator("/admin/fold", {"name": "all"}, **strange)[0] == 403
    assert operator("/admin/fold", method="GET")[1]["folded"] is None


def test_files_that_change_under_the_server_change_nothing_and_are_reported(served, operator):
    weights = served.folder / "q-and-v" / "adapter_model.safetensors"
    whole = weights.read_bytes()
    try:
        weights.write_bytes(whole[: len(whole) // 2])
        status, done = operator("/admin/fold", {"name": "q-and-v"})
        state = operator("/admin/fold", method="GET")[1]
        again = operator("/admin/fold", {"name": "q-and-v"})[1]
    finally:
        weights.write_bytes(whole)
    assert status == 200 and done["changed_on_disk"], done
    assert state["changed_on_disk"] == ["q-and-v"]
    assert again == {"folded": "q-and-v", "changed": False, "changed_on_disk": True}
    result = agreement.compare(served, "q-and-v")["q-and-v"]
    assert result.worst < 1e-4 and result.greedy == len(agreement.PROMPTS)
    assert operator("/admin/fold", method="GET")[1]["changed_on_disk"] == []


def test_a_damaged_copy_is_refused_before_the_engine_is_touched(served, operator):
    store = SnapshotStore(cache_root() / "serve" / "adapters")
    weights = store.take(served.folder / "q-and-v").path / "adapter_model.safetensors"
    whole = weights.read_bytes()
    try:
        weights.write_bytes(whole[: len(whole) // 2])
        status, answer = operator("/admin/fold", {"name": "q-and-v"})
    finally:
        weights.write_bytes(whole)
    assert status == 409 and "nothing was changed" in answer["error"]["message"]
    assert "truncated or damaged" in answer["error"]["message"]


def _double_a_linear(source, target):
    """Another base: one linear of the middle differs, in a file of its own."""
    tensors = load_file(source)
    name = next(n for n in tensors if "h.0.mlp.c_proj.weight" in n)
    save_file(tensors | {name: tensors[name] * 2}, target.with_suffix(".new"), {"format": "pt"})
    target.with_suffix(".new").replace(target)


@pytest.mark.engine
def test_gpt2_folded_at_start_with_a_key_while_its_base_changes_on_disk(tiny_base, tmp_path):
    base, folder = tmp_path / "base", tmp_path / "adapters"
    shutil.copytree(tiny_base("gpt2"), base)
    random_adapter(base, folder / "one", r=8, seed=1)
    random_adapter(base, folder / "two", r=8, seed=2, magnorm=BOUNDED)
    log = tmp_path / "log"
    with serving(base, folder, log, *FLAGS, "--fold", "one", "--admin-api-key", "sesame") as served:
        assert "no per-request adapters for GPT2LMHeadModel" in log.read_text()
        result = agreement.compare(served, "one")["one"]
        assert result.worst < 1e-4 and result.greedy == len(agreement.PROMPTS)
        stranger = Operator(served.url, {})
        assert stranger("/admin/unfold")[0] == 401
        assert stranger("/admin/unfold", Authorization="Bearer wrong")[0] == 401
        operator = Operator(served.url, {"Authorization": "Bearer sesame"})
        assert operator("/admin/unfold")[0] == 200
        client = openai.OpenAI(base_url=served.url, api_key="none", max_retries=0)
        assert agreement.compare(served, served.base)[served.base].worst < 1e-4
        with pytest.raises(openai.ConflictError, match="--fold one"):
            client.completions.create(model="one", prompt="x")

        def fold_two(meanwhile):
            """What is answered if ``meanwhile`` is called after the look, before the fold."""
            stream, answers = slowly(client, served.base), []
            next(stream)
            folding = threading.Thread(
                target=lambda: answers.append(
                    operator("/admin/fold", {"name": "two", "timeout": 300})
                )
            )
            folding.start()
            operator.until_held(folding)
            meanwhile()
            stream.close()
            folding.join(timeout=120)
            return answers[0][0], answers[0][1]["error"]["message"]

        weights, kept = base / "model.safetensors", base / "kept"

        def replaced():
            weights.rename(kept)
            _double_a_linear(kept, weights)

        for meanwhile in (replaced, lambda: weights.rename(kept)):
            status, said = fold_two(meanwhile)
            assert status == 409 and "nothing was changed: model.safetensors" in said
            kept.replace(weights)
            assert agreement.compare(served, served.base)[served.base].worst < 1e-4
        assert operator("/admin/fold", {"name": "two"})[0] == 200
        replaced()
        status, answer = operator("/admin/unfold")
        assert status == 409 and "model.safetensors" in answer["error"]["message"]
        # The oracle reads the files, too.
        kept.replace(weights)
        assert agreement.compare(served, "two")["two"].worst < 1e-4
        assert operator("/admin/unfold")[0] == 200
        assert agreement.compare(served, served.base)[served.base].worst < 1e-4


class FailingEngine:
    """In the engine's place: every change of weights fails in the workers."""

    async def pause_generation(self, **how):
        pass

    async def collective_rpc(self, *call, **how):
        raise RuntimeError("the disk is gone")


@pytest.mark.long
def test_the_server_stops_when_nothing_can_be_put_back(tiny_base, tmp_path, monkeypatch):
    parts = house(tmp_path, tiny_base("qwen2"))
    random_adapter(parts.base, parts.folder / "one", r=4, seed=1)
    parts.fill()
    folding, ended = Folding(parts.base, Answers(["base"], parts.library)), []
    folding._engine, folding._models = FailingEngine(), SimpleNamespace()
    monkeypatch.setattr("os.kill", lambda pid, number: ended.append((pid, number)))
    with pytest.raises(FoldError, match="server is stopping.*could not be put back"):
        asyncio.run(folding.change("one"))
    assert ended == [(os.getpid(), signal.SIGTERM)]
    assert folding.answers.refusal("base").status == 503


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["tensor", "data"])
def test_a_fold_on_two_ranks(layout, tiny_base, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    base, folder = tiny_base("qwen2"), tmp_path / "adapters"
    random_adapter(base, folder / "all", r=8, seed=1)
    random_adapter(base, folder / "bounded", r=8, seed=2, magnorm=BOUNDED)
    _save_wild(base, folder / "wild")
    flags = (*FLAGS, f"--{layout}-parallel-size", "2")
    with serving(base, folder, tmp_path / "log", *flags) as served:
        assert all(r.worst < 1e-4 for r in agreement.compare(served).values())
        operator = Operator(served.url, {})
        # Of ranks that fail none is waited for in vain, and none misunderstood later.
        for _ in range(2):
            status, answer = operator("/admin/fold", {"name": "wild"})
            assert status == 409 and "the base was put back" in answer["error"]["message"], answer
            assert "layers.1.mlp" in answer["error"]["message"]
        assert all(r.worst < 1e-4 for r in agreement.compare(served).values())
        assert operator("/admin/fold", {"name": "bounded"})[0] == 200
        result = agreement.compare(served, "bounded")["bounded"]
        assert result.worst < 1e-4 and result.greedy == len(agreement.PROMPTS), result
        assert operator("/admin/unfold")[0] == 200
        assert all(r.worst < 1e-4 for r in agreement.compare(served).values())
