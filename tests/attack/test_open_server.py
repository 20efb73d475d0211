"""Proves on one running server that its doors are closed: keys, and adapters loaded at runtime.
Also that its log is JSON, and that it counts what its slots do.

Needs vLLM on a CPU. What needs no engine is in test_doors.py and test_loading.py.
"""

from __future__ import annotations

import json
import shutil
import time
import urllib.error
import urllib.request

import pytest

from tests.support.engines import random_adapter, serving

FLAGS = (
    "--enforce-eager --dtype float32 --max-model-len 256 --max-num-seqs 8 --max-loras 1 --no-watch"
    " --log-format json"
)
LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"


@pytest.fixture(scope="module")
def served(tiny_base, tmp_path_factory):
    base, folder = tiny_base("llama"), tmp_path_factory.mktemp("adapters")
    random_adapter(base, folder / "first", r=8, seed=1)
    log = tmp_path_factory.mktemp("log") / "log"
    keys = ["--api-key", "user-key", "--admin-api-key", "admin-key"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
        patch.setenv("VLLM_SERVER_DEV_MODE", "1")
        patch.setenv("VLLM_LOGGING_LEVEL", "INFO")
        with serving(base, folder, log, *FLAGS.split(), *keys) as server:
            yield server


@pytest.fixture
def post(served):
    def send(path, key=None, **body):
        request = urllib.request.Request(
            served.url.removesuffix("/v1") + path,
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        if key:
            request.add_header("Authorization", f"Bearer {key}")
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    return send


def complete(post, model, key="user-key"):
    return post("/v1/completions", key, model=model, prompt="Hello", max_tokens=8, temperature=0)


def test_strangers_and_users_stay_outside(post, served):
    generating = {"model": served.base, "prompt": "Hello", "max_tokens": 2}
    for path in ("/v1/completions", "/invocations", "/generative_scoring", "/tokenize"):
        assert post(path, **generating)[0] == 401
        assert post(path, "wrong", **generating)[0] == 401
    for key in ("user-key", "admin-key"):
        assert post("/v1/completions", key, **generating)[0] == 200
    for path in ("/scale_elastic_ep", "/collective_rpc", "/sleep", "/reset_prefix_cache", LOAD):
        for key in (None, "user-key"):
            assert post(path, key)[0] == 401, path
    assert post("/reset_prefix_cache", "admin-key")[0] == 200
    assert post("/adapters", "admin-key", name="x", src="/etc")[0] == 501
    for path in ("/health", "/metrics", "/version", "/openapi.json"):
        with urllib.request.urlopen(served.url.removesuffix("/v1") + path, timeout=30) as answer:
            assert answer.status == 200
    log = served.log.read_text()
    # Again below vLLM's log, which is long.
    assert "secura-serve is ready" in log.partition("who can reach what:")[2]
    assert "who can reach what:" in log and "(this machine only), with a key of --api-key" in log
    assert "user-key" not in log and "admin-key" not in log


def test_an_adapter_that_comes_later_is_checked_loaded_and_unloaded(post, served, tiny_base):
    before = complete(post, "first")
    random_adapter(tiny_base("llama"), served.folder / "later", r=8, seed=2)
    random_adapter(tiny_base("llama"), served.folder / "wide", r=24, seed=3)
    random_adapter(tiny_base("mistral"), served.folder / "other", r=8, seed=4)
    assert complete(post, "later")[0] == 404
    for name, path in (
        ("wide", "wide"),
        ("other", "other"),
        ("x", "user/x"),
        ("../x", "later"),
        ("etc", "/etc"),
        (served.base, "later"),
    ):
        status, text = post(LOAD, "admin-key", lora_name=name, lora_path=path)
        assert status == 400, (name, status, text)
    assert post(LOAD, "admin-key", lora_name="later", lora_path="later")[0] == 200
    status, later = complete(post, "later")
    assert status == 200 and json.loads(later)["model"] == "later"
    texts = [json.loads(text)["choices"][0]["text"] for text in (before[1], later)]
    assert texts[0] != texts[1]
    assert post("/admin/fold", "admin-key", name="first")[0] == 200
    again = {"lora_name": "later", "lora_path": "later"}
    assert post(LOAD, "admin-key", **again)[0] == 400
    assert post(LOAD, "admin-key", **again, load_inplace=True)[0] == 200
    assert complete(post, "later")[0] == 409
    assert post("/admin/unfold", "admin-key")[0] == 200
    assert json.loads(complete(post, "later")[1])["choices"][0]["text"] == texts[1]
    assert post(UNLOAD, "admin-key", lora_name="later")[0] == 200
    assert complete(post, "later")[0] == 404
    shutil.rmtree(served.folder / "later")
    assert post(LOAD, "admin-key", lora_name="later", lora_path="later")[0] == 400
    assert complete(post, "first")[1].split('"choices"')[1] == before[1].split('"choices"')[1]


def test_every_line_of_its_log_is_json_and_its_slots_are_counted(post, served, tiny_base):
    random_adapter(tiny_base("llama"), served.folder / "second", r=4, seed=5)
    before = counted(served)
    assert post("/v1/adapters/reload", "admin-key")[0] == 200
    for name in ("first", "first", "second", "first"):
        assert complete(post, name)[0] == 200
    time.sleep(1.1)  # The engine is asked for its slots once a second.
    after = counted(served)
    # One slot: second takes that of first, which takes it back.
    loads, evictions = (
        after[f"secura_adapter_{what}_total"] - before[f"secura_adapter_{what}_total"]
        for what in ("loads", "evictions")
    )
    assert loads in (2, 3) and evictions == 2, (before, after)
    assert after['secura_adapters{state="resident"}'] == 1
    kind = 'secura_watch_events_total{kind="added"}'
    assert after[kind] > before[kind]
    lines = served.log.read_text("utf-8").splitlines()
    ready = next(i for i, line in enumerate(lines) if "secura-serve is ready" in line)
    written = [json.loads(line) for line in lines[ready:]]
    assert {"secura_serve", "uvicorn.access"} <= {line["logger"] for line in written}
    assert any("second is served as second@" in line["message"] for line in written)
    # Libraries print past the logging system during the start; we and vLLM do not.
    started = [json.loads(line) for line in lines[:ready] if line.startswith("{")]
    assert any(line["message"].startswith("ADAPTER") for line in started)
    assert any(line["logger"].startswith("vllm.") for line in started)


def counted(served):
    """Return the server's metrics by name and labels."""
    with urllib.request.urlopen(served.url.removesuffix("/v1") + "/metrics") as answer:
        lines = answer.read().decode().splitlines()
    return {
        name: float(value)
        for name, _, value in (line.rpartition(" ") for line in lines if line[:1] != "#")
    }
