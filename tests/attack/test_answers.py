"""Proves that no request is answered by another model than the one it names: whatever route it
takes, whatever happens to files while the server runs, and whatever else is going on.

Needs vLLM on a CPU and a tiny base. One server on loopback with a single slot and a cache of one,
so that every change of model is an eviction; its copies lie in a folder of its own, which the
tests delete.
"""

from __future__ import annotations

import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest

from secura_serve.bases import cache_root
from secura_serve.method import MagNorm
from secura_serve.serve.app.http.routes import ROUTES
from tests.support.engines import random_adapter, random_lora, serving

pytestmark = pytest.mark.engine
PROMPT = "The quick brown fox jumps over the lazy dog. " * 12
FLAGS = (
    *("--resident", "0"),
    *("--enforce-eager", "--dtype", "float32", "--max-model-len", "512"),
    *("--max-loras", "1", "--max-cpu-loras", "1", "--no-watch"),
)
ADAPTERS = ("one", "two", "lora")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    # To compile the kernels again would take half a minute.
    if (compiled := cache_root() / "native").is_dir():
        shutil.copytree(compiled, folder / "native")
    return folder


@pytest.fixture(scope="module")
def server(tiny_base, tmp_path_factory, cache):
    root = tmp_path_factory.mktemp("answers")
    base, folder = tiny_base("llama"), root / "adapters"
    random_adapter(base, folder / "one", r=8, seed=1)
    random_adapter(base, folder / "two", r=8, seed=2)
    random_adapter(
        base, folder / "bounded", r=8, seed=3, magnorm=MagNorm("bounded", tau=0.2), size=20
    )
    random_lora(base, folder / "lora", r=4, seed=4, only=["q_proj", "down_proj"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SECURA_CACHE", str(cache))
        patch.setenv("VLLM_ENABLE_RESPONSES_API_STORE", "1")
        with serving(base, folder, root / "log", *FLAGS, "--served-model-name", "base") as server:
            yield server


@pytest.fixture
def http(server):
    root = server.url.removesuffix("/v1")
    with httpx.Client(base_url=root, timeout=300) as client:
        yield client
        client.post("/admin/unfold", json={"timeout": 300})


@pytest.fixture
def client(server):
    return openai.OpenAI(base_url=server.url, api_key="none", max_retries=0)


def logprobs(client, name, prompt=PROMPT):
    answer = client.completions.create(
        model=name, prompt=prompt, max_tokens=4, temperature=0, logprobs=5
    )
    return answer.choices[0].logprobs.top_logprobs


@pytest.fixture(scope="module")
def truth(server):
    """What each model answers while nothing is wrong; four different answers."""
    client = openai.OpenAI(base_url=server.url, api_key="none", max_retries=0)
    answers = {name: logprobs(client, name) for name in ("base", *ADAPTERS)}
    assert len({str(answer) for answer in answers.values()}) == 4
    return answers


def assert_close(got, want):
    """Equal up to the rounding of another batch or a cached prompt."""
    for mine, other in zip(got, want, strict=True):
        assert mine == pytest.approx(other, abs=1e-4)


QUESTION = {"prompt": PROMPT, "max_tokens": 4, "temperature": 0, "logprobs": 5}
HEADER = "X-Amzn-SageMaker-Adapter-Identifier"


@pytest.mark.parametrize("name", ["base", *ADAPTERS])
def test_invocations_answers_as_the_model_that_is_named(name, http, truth):
    for body, headers in (
        ({"model": name}, {}),
        ({}, {HEADER: name}),
        ({"model": name}, {HEADER: name}),
    ):
        answer = http.post("/invocations", json=QUESTION | body, headers=headers)
        assert answer.status_code == 200, answer.text
        assert answer.json()["model"] == name
        assert_close(answer.json()["choices"][0]["logprobs"]["top_logprobs"], truth[name])


def test_invocations_refuses_what_it_cannot_honour(http):
    for body, headers, status in (
        ({"model": "nobody"}, {}, 404),
        ({}, {HEADER: "nobody"}, 404),
        ({"model": "bounded"}, {}, 409),
        ({"model": "bounded*0.5"}, {}, 409),
        ({"model": "one"}, {HEADER: "two"}, 400),
        ({"model": 5}, {}, 400),
        ({"model": ["one"]}, {}, 400),
    ):
        answer = http.post("/invocations", json=QUESTION | body, headers=headers)
        assert answer.status_code == status and "error" in answer.json(), answer.text


def _mounted(http):
    """The routes of the running server that the table says a model answers on."""
    offered = http.get("/openapi.json").json()["paths"]
    return [r.path for r in ROUTES if r.purpose == "generate" and "post" in offered.get(r.path, {})]


def test_no_route_answers_for_an_unknown_or_an_unfolded_name(http):
    routes = _mounted(http)
    assert {"/v1/completions", "/v1/chat/completions", "/v1/responses", "/invocations"} <= {*routes}
    for path in routes:
        for name, status in (("nobody", 404), ("bounded", 409)):
            answer = http.post(path, json={"model": name})
            assert (path, answer.status_code) == (path, status)
            assert answer.json()["error"]["code"] == status
    assert http.post("/admin/fold", json={"name": "bounded"}).status_code == 200
    for path in routes:
        for name, status in (("nobody", 404), ("base", 409), ("one", 409), (None, 409)):
            answer = http.post(path, json={"model": name})
            assert (path, name, answer.status_code) == (path, name, status)


def test_an_unknown_model_is_told_what_answers(http, client):
    with pytest.raises(openai.NotFoundError, match="Did you mean one") as caught:
        client.completions.create(model="ONE", prompt="x")
    assert "base, lora, one, two" in str(caught.value) and caught.value.status_code == 404
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="x" * 5000, prompt="x")
    assert len(str(caught.value)) < 600
    card = client.models.retrieve("one")
    assert card.id == "one" and card.parent == "base"
    assert client.models.retrieve("bounded").status == "unfolded"
    with pytest.raises(openai.NotFoundError, match="Did you mean two"):
        client.models.retrieve("twoo")


def test_a_folder_that_vanishes_or_is_damaged_changes_no_answer(server, http, client, truth):
    assert client.models.retrieve("one").root == str(server.folder / "one")
    shutil.rmtree(server.folder / "one")
    weights = server.folder / "two" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    (server.folder / "lora" / "adapter_config.json").write_text("{")
    for name in (*ADAPTERS, "base", *ADAPTERS):
        assert_close(logprobs(client, name), truth[name])
    for path, body in (("/admin/fold", {"name": "two"}), ("/admin/unfold", {})):
        answer = http.post(path, json=body)
        assert answer.status_code == 200, answer.text
    for name in ("one", "lora", "two", "base"):
        assert_close(logprobs(client, name), truth[name])
    changed = http.get("/admin/fold").json()["changed_on_disk"]
    assert sorted(changed) == ["lora", "one", "two"]


def test_a_client_that_does_not_read_cannot_hold_a_fold(http, client, truth):
    with http.stream(
        "POST",
        "/v1/completions",
        json={
            "model": "base",
            "prompt": ["Once upon"] * 24,
            "max_tokens": 480,
            "logprobs": 20,
            "stream": True,
            "ignore_eos": True,
        },
    ) as stalled:
        pieces = stalled.iter_raw()
        assert next(pieces) and stalled.status_code == 200
        start = time.monotonic()
        answer = http.post("/admin/fold", json={"name": "bounded", "timeout": 0.5})
        assert answer.status_code == 409 and "took longer" in answer.json()["error"]["message"]
        assert time.monotonic() - start < 20
        assert_close(logprobs(client, "two"), truth["two"])


def test_a_fold_waits_for_an_answer_that_is_written_in_the_background(http):
    started = http.post(
        "/v1/responses",
        json={
            "model": "base",
            "input": "hello",
            "background": True,
            "max_output_tokens": 300,
            "temperature": 0,
        },
    )
    assert started.status_code == 200, started.text
    name = started.json()["id"]
    assert http.get("/admin/fold").json()["running_requests"] == 1
    with ThreadPoolExecutor() as pool:
        folding = pool.submit(http.post, "/admin/fold", json={"name": "bounded", "timeout": 200})
        assert folding.result().status_code == 200
    answer = http.get(f"/v1/responses/{name}").json()
    assert answer["status"] in ("completed", "incomplete"), answer
    assert http.get("/admin/fold").json() | {"folded": "bounded", "running_requests": 0} == (
        http.get("/admin/fold").json()
    )


def test_copies_that_vanish_change_no_answer_and_refuse_a_fold(http, client, truth, cache):
    """Last: the server of this module cannot fold any more."""
    shutil.rmtree(cache)
    for name in (*ADAPTERS, *ADAPTERS, "base"):
        assert_close(logprobs(client, name), truth[name])
    answer = http.post("/admin/fold", json={"name": "bounded"})
    assert answer.status_code == 409 and "nothing was changed" in answer.json()["error"]["message"]
    assert_close(logprobs(client, "one"), truth["one"])
