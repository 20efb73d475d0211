"""Proves the life of an adapter in a running server: it comes, changes, is pushed to, rolled back
and goes, and every answer is that of its version.

Needs vLLM on a CPU and a tiny base; one float32 server with two slots for more adapters than that.
What a version must answer is asked of the same content under a name that never changes.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import httpx
import pytest
from safetensors.torch import load_file, save

from secura_serve.method import MagNorm
from tests.support.engines import random_adapter, serving

R = TypeVar("R")

FLAGS = ("--enforce-eager", "--dtype", "float32", "--max-model-len", "512", "--max-loras", "2")
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


@dataclass
class Running:
    """A server, its adapters folder, and contents to put there: ``first``, ``second``, ..."""

    http: httpx.Client
    folder: Path
    base: Path
    contents: Path
    log: Path

    def answer(self, model: str, tokens: int = 6) -> list[float]:
        """Return logprobs that tell the weights of one model from those of any other."""
        body = {"model": model, "prompt": "One two three", "max_tokens": tokens, "logprobs": 1}
        reply = self.http.post("/v1/completions", json=body | {"temperature": 0})
        assert reply.status_code == 200, reply.text
        return [round(v, 3) for v in reply.json()["choices"][0]["logprobs"]["token_logprobs"]]

    def status(self, model: str) -> int:
        body = {"model": model, "prompt": "x", "max_tokens": 1}
        return self.http.post("/v1/completions", json=body).status_code

    def adapter(self, name: str) -> dict:
        reply = self.http.get(f"/v1/adapters/{name}")
        return reply.json() if reply.status_code == 200 else {}

    def put(self, content: str, name: str) -> None:
        """Place a content in the folder as our own writers do: in one step."""
        hidden = self.folder / f".{name}.partial"
        shutil.copytree(self.contents / content, hidden)
        if (self.folder / name).exists():
            shutil.rmtree(self.folder / name)
        hidden.rename(self.folder / name)

    def until(self, true: Callable[[], object], seconds: float = 20) -> None:
        deadline = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < deadline, self.log.read_text(errors="replace")[-3000:]
            time.sleep(0.05)

    def under_way(self, pool: Executor, ask: Callable[[], R]) -> Future[R]:
        """Begin a long request and wait until the server has it. On a busy machine its answer may
        be over before that is seen; then it is asked again."""
        for _ in range(5):
            running = pool.submit(ask)
            while not running.done():
                if self.http.get("/admin/fold").json()["running_requests"] and not running.done():
                    return running
                time.sleep(0.05)
        raise AssertionError("each answer was over before the server was seen at it")

    def serve(self, content: str, name: str) -> str:
        """Place a content and wait until it is served; return its digest."""
        before = self.adapter(name).get("digest")
        self.put(content, name)
        self.until(lambda: self.adapter(name).get("digest") not in (None, before))
        return self.adapter(name)["digest"]


@pytest.fixture(scope="module")
def started(tiny_base, tmp_path_factory) -> Iterator[Running]:
    base, root = tiny_base("llama"), tmp_path_factory.mktemp("swap")
    contents, folder = root / "contents", root / "adapters"
    for seed, name in enumerate(("first", "second", "third"), start=1):
        random_adapter(base, contents / name, r=4, seed=seed)
        shutil.copytree(contents / name, folder / name)
    random_adapter(base, contents / "bounded", r=4, seed=9, magnorm=MagNorm("bounded"))
    with (
        serving(base, folder, root / "log", *FLAGS) as server,
        httpx.Client(base_url=server.url.removesuffix("/v1"), timeout=120) as http,
    ):
        yield Running(http, folder, base, contents, server.log)


def test_the_contents_differ_and_a_known_adapter_takes_a_slot(started):
    answers = {name: started.answer(name) for name in ("first", "second", "third")}
    assert len({tuple(answer) for answer in answers.values()}) == 3
    states = {a["id"]: a["state"] for a in started.http.get("/v1/adapters").json()["data"]}
    assert set(states.values()) == {"resident", "known"} and states["third"] == "resident"


def test_an_adapter_comes_changes_is_rolled_back_and_goes(started):
    started.put("first", "x")
    started.until(lambda: started.status("x") == 200)
    assert started.answer("x") == started.answer("first")
    one, two = started.adapter("x")["digest"], started.serve("second", "x")
    assert started.answer("x") == started.answer("second")
    assert started.answer(f"x@{one}") == started.answer("first")
    assert started.answer(f"x@{two[:8]}") == started.answer("second")
    assert started.status("x@00000000") == started.status(f"x@{one[:4]}") == 404
    back = started.http.post("/v1/adapters/x/rollback").json()
    assert back["digest"] == one and back["rolled_back"]
    assert started.answer("x") == started.answer("first")
    three = started.serve("third", "x")
    assert [v["digest"] for v in started.adapter("x")["versions"]] == [three, two, one]
    assert started.answer("x") == started.answer("third")
    assert started.http.get("/v1/models/x").status_code == 200
    shutil.rmtree(started.folder / "x")
    started.until(lambda: started.status("x") == 404)
    assert "x" not in [m["id"] for m in started.http.get("/v1/models").json()["data"]]


def test_a_request_ends_on_the_version_that_it_began_with(started):
    started.serve("first", "y")
    whole = {"prompt": "Go", "max_tokens": 480, "ignore_eos": True, "seed": 7, "n": 16}

    def text(model: str) -> set[str]:
        reply = started.http.post("/v1/completions", json=whole | {"model": model})
        assert reply.status_code == 200, reply.text
        return {choice["text"] for choice in reply.json()["choices"]}

    with ThreadPoolExecutor(1) as pool:
        running = started.under_way(pool, lambda: text("y"))
        started.serve("second", "y")
        assert not running.done(), "the answer was over before the update"
        newer = started.answer("y")
        assert running.result() == text("first")
    assert newer == started.answer("second")


def test_content_that_comes_back_joins_the_requests_that_still_run_on_it(started):
    started.serve("first", "back")
    # For more than the two seconds after which a folder counts as gone.
    whole = {"prompt": "Go", "max_tokens": 480, "ignore_eos": True, "n": 64, "model": "back"}
    with ThreadPoolExecutor(1) as pool:
        running = started.under_way(pool, lambda: started.http.post("/v1/completions", json=whole))
        shutil.rmtree(started.folder / "back")
        started.until(lambda: started.status("back") == 404)
        started.put("first", "back")
        started.until(lambda: started.status("back") == 200)
        assert not running.done(), "the answer was over before the content came back"
        assert started.answer("back") == started.answer("first")
        assert running.result().status_code == 200
    # What retired meanwhile has not taken it away.
    assert started.answer("back") == started.answer("first")


def test_a_bad_update_leaves_the_old_one_serving_and_says_so(started):
    digest = started.serve("first", "z")
    for damage in (
        lambda folder: (folder / WEIGHTS).write_bytes(b"x" * 99),
        lambda folder: (folder / CONFIG).write_text("{}"),
        lambda folder: shutil.copy(started.contents / "second" / WEIGHTS, folder / WEIGHTS),
    ):
        shutil.rmtree(started.folder / "z")
        hidden = started.folder / ".z"
        shutil.copytree(started.contents / "first", hidden)
        damage(hidden)
        hidden.rename(started.folder / "z")
        started.until(lambda: started.adapter("z").get("reason"))
        assert started.adapter("z")["digest"] == digest
        assert started.answer("z") == started.answer("first")
        started.serve("third", "z")
        digest = started.serve("first", "z")
        assert started.adapter("z")["reason"] is None


def test_a_foreign_copy_is_served_once_it_is_complete(started):
    """File by file, the configuration first and without a digest, as `cp -r` of another program."""
    target = started.folder / "foreign"
    target.mkdir()
    config = json.loads((started.contents / "first" / CONFIG).read_text())
    del config["weights_digest"]
    (target / CONFIG).write_text(json.dumps(config))
    weights = (started.contents / "first" / WEIGHTS).read_bytes()
    with (target / WEIGHTS).open("wb") as file:
        for start in range(0, len(weights), len(weights) // 8 + 1):
            file.write(weights[start : start + len(weights) // 8 + 1])
            file.flush()
            time.sleep(0.4)
            assert started.status("foreign") == 404
    started.until(lambda: started.status("foreign") == 200)
    assert started.answer("foreign") == started.answer("first")
    assert "foreign is served, as it has not changed" in started.log.read_text()


def test_uploads_pushes_pins_and_aliases(started):
    def files(content: str) -> list:
        folder = started.contents / content
        return [("file", (name, (folder / name).read_bytes())) for name in (CONFIG, WEIGHTS)]

    made = started.http.put("/v1/adapters/up", files=files("first"))
    assert made.status_code == 200, made.text
    assert started.answer("up") == started.answer("first")
    assert (started.folder / "up" / WEIGHTS).is_file()
    refused = started.http.put("/v1/adapters/up", files=files("first")[:1])
    assert refused.status_code == 400 and "is missing" in refused.json()["error"]["message"]

    cores = {
        key: value
        for key, value in load_file(started.contents / "second" / WEIGHTS).items()
        if key.endswith("secura_U")
    }
    basis = {"X-Secura-Basis": started.adapter("up")["basis"]["id"]}
    pushed = started.http.put("/v1/adapters/up/weights", content=save(cores), headers=basis)
    assert pushed.status_code == 200, pushed.text
    assert started.answer("up") == started.answer("second")
    assert pushed.json()["versions"][0]["origin"] == "push"
    some = save(dict(list(cores.items())[1:]))
    for body, headers, status in (
        (b"junk", {}, 400),
        (some, {}, 409),
        (save(cores), {"X-Secura-Basis": "0" * 32}, 409),
        (save(cores), {"X-Secura-Magnorm": '{"mode": "bounded"}'}, 409),
        (save({k: v * float("nan") for k, v in cores.items()}), {}, 400),
    ):
        reply = started.http.put("/v1/adapters/up/weights", content=body, headers=headers)
        assert reply.status_code == status, reply.text
    assert started.http.put("/v1/adapters/none/weights", content=b"").status_code == 404

    assert started.http.post("/v1/adapters/up/pin").json()["state"] == "resident"
    for name in ("first", "second", "third"):
        started.answer(name)
    assert started.adapter("up")["state"] == "resident"
    # Two others at once take both slots, the pinned one's too, and nobody is refused.
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(lambda name: started.answer(name, 60), ("first", "third")))
    assert both == [started.answer("first", 60), started.answer("third", 60)]
    assert started.answer("up") == started.answer("second")
    assert started.adapter("up")["pinned"] and started.adapter("up")["state"] == "resident"
    other = started.http.post("/v1/adapters/first/pin")
    assert other.status_code == 409 and "unpin one" in other.json()["error"]["message"]
    assert not started.http.post("/v1/adapters/up/pin", json={"pinned": False}).json()["pinned"]

    digest = started.adapter("up")["versions"][1]["digest"]
    body = {"adapter": f"up@{digest}"}
    assert started.http.put("/v1/aliases/stable", json=body).status_code == 200
    assert started.answer("stable") == started.answer("first")
    assert started.http.put("/v1/aliases/stable", json={"adapter": "up"}).status_code == 200
    assert started.answer("stable") == started.answer("second")
    assert started.http.put("/v1/aliases/first", json=body).status_code == 400
    assert started.http.delete("/v1/adapters/up").json()["deleted"]
    assert started.status("up") == started.status("stable") == 404
    assert not (started.folder / "up").exists()


def test_an_s_magnorm_adapter_that_came_later_is_folded_and_its_update_too(started):
    started.serve("bounded", "b")
    assert started.adapter("b")["mode"] == "fold" and started.status("b") == 409
    assert started.http.post("/admin/fold", json={"name": "b"}).json()["changed"]
    assert started.adapter("b")["state"] == "folded"
    folded = started.answer("b")
    other = started.contents / "other"
    random_adapter(started.base, other, r=4, seed=10, magnorm=MagNorm("bounded"))
    started.serve("other", "b")
    # What is in the weights stays there until somebody folds again.
    assert started.answer("b") == folded
    assert started.http.post("/admin/fold", json={"name": "b"}).json()["changed"]
    assert started.answer("b") != folded
    assert started.http.post("/admin/unfold").json()["changed"]


def test_vllms_own_routes_load_and_unload_and_free_the_slot(started):
    load = {"lora_name": "first", "lora_path": "first"}
    assert started.http.post("/v1/load_lora_adapter", json=load).status_code == 400
    again = load | {"load_inplace": True}
    assert started.http.post("/v1/load_lora_adapter", json=again).status_code == 200
    started.answer("first")
    unload = started.http.post("/v1/unload_lora_adapter", json={"lora_name": "first"})
    assert unload.status_code == 200 and started.status("first") == 404
    reply = started.http.post("/v1/load_lora_adapter", json=load)
    assert reply.text == "Success: LoRA adapter 'first' added successfully."
    assert started.status("first") == 200
