"""Proves that the change of every linear is that of transformers' models on W and on W' (made in
float64 by the oracle), for each kind of adapter; and that the route computes a content once for all
who ask, beside the other requests, and tells what it cannot.

Needs torch, transformers, PEFT and vLLM; tiny random bases, no engine.
"""

from __future__ import annotations

import json
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file
from transformers.pytorch_utils import Conv1D

from secura_serve.checkpoint import Checkpoint
from secura_serve.method import MagNorm
from secura_serve.serve.app.adapters import changes
from secura_serve.serve.app.adapters.changes import relative_changes
from secura_serve.serve.app.adapters.content.images import DeltaImages
from secura_serve.serve.app.adapters.content.snapshots import SnapshotStore
from secura_serve.serve.app.adapters.content.verifier import Verifier
from tests.support.engines import random_adapter, random_fine_tune, random_lora
from tests.support.lifecycle import house, serving_app
from tests.support.oracle import adapted

NORMS = {
    "cur": None,
    "bounded": MagNorm("bounded", tau=0.05),
    "published": MagNorm("published"),
}


def make(kind, base, folder, only):
    if kind == "lora":
        return random_lora(base, folder, r=4, seed=3, only=list(only))
    if kind == "full":
        return random_fine_tune(base, folder, seed=3, only=only)
    return random_adapter(base, folder, r=5, seed=3, only=only, magnorm=NORMS[kind])


def moved(base, folder):
    """Return module -> ‖W'−W‖/‖W‖ of what differs between two models."""
    pristine, model = adapted(base, None), adapted(base, folder)
    ratios = {}
    for name in Checkpoint(base).linears():
        W, new = (m.get_submodule(name).weight.data.double() for m in (pristine, model))
        if isinstance(model.get_submodule(name), Conv1D):
            W, new = W.T, new.T
        if (new != W).any():
            ratios[name] = float((new - W).square().sum().sqrt() / W.square().sum().sqrt())
    return ratios


def examined(base, folder, root):
    images = DeltaImages(root / "deltas", base, "float32")
    store = SnapshotStore(root / "copies")
    return Verifier(lambda: Checkpoint(base), store, images=images).examine(folder)


@pytest.mark.parametrize(
    ("arch", "kind"),
    [("llama", kind) for kind in (*NORMS, "lora", "full")]
    + [("gpt2", kind) for kind in (*NORMS, "full")],
)
def test_every_kind_moves_what_the_oracle_says(arch, kind, tiny_base, tmp_path):
    base = tiny_base(arch)
    only = ("c_attn", "c_proj") if arch == "gpt2" else ("q_proj", "down_proj")
    folder = make(kind, base, tmp_path / kind, only)
    told = dict(relative_changes(examined(base, folder, tmp_path), Checkpoint(base)))
    expected = moved(base, folder)
    assert told.keys() == expected.keys() and len(told) > 2
    # The oracle's W' is rounded to float32.
    assert told == pytest.approx(expected, rel=2e-5)


def test_a_lora_is_scaled_as_its_patterns_say(tiny_base, tmp_path):
    base = tiny_base("llama")
    folder = random_lora(base, tmp_path / "lora", r=4, seed=1, only=["q_proj", "v_proj"])
    file = folder / "adapter_config.json"
    raw = json.loads(file.read_text())
    raw |= {"use_rslora": True, "lora_alpha": 6, "alpha_pattern": {"layers.1.self_attn.q_proj": 3}}
    file.write_text(json.dumps(raw))
    told = dict(relative_changes(examined(base, folder, tmp_path), Checkpoint(base)))
    tensors, checkpoint = load_file(folder / "adapter_model.safetensors"), Checkpoint(base)
    for module, ratio in told.items():
        A, B = (tensors[f"base_model.model.{module}.lora_{side}.weight"].double() for side in "AB")
        alpha = 3 if module == "model.layers.1.self_attn.q_proj" else 6
        W = checkpoint.weight(module).double()
        assert ratio == pytest.approx(float((alpha / 2 * B @ A).norm() / W.norm()), rel=1e-10)


@pytest.fixture
def server(tiny_base, tmp_path):
    base = tiny_base("llama")
    parts = house(tmp_path, base)
    random_adapter(base, parts.folder / "one", r=4, seed=0, only=("v_proj", "q_proj"))
    parts.fill()
    with serving_app(parts) as app:
        yield SimpleNamespace(parts=parts, base=base, client=app.client)


def ask(server, name="one"):
    return server.client.get(f"/v1/adapters/{name}/changes")


def test_the_route_tells_the_changes_of_the_version_that_serves(server):
    told = ask(server).json()
    record = server.parts.library.record("one")
    assert (told["id"], told["digest"]) == ("one", record.serving.digest)
    assert told["modules"] == pytest.approx(
        moved(server.base, server.parts.folder / "one"), rel=1e-4
    )
    modules = [*told["modules"]]
    assert modules == [m for m in Checkpoint(server.base).linears() if m in modules]
    random_adapter(server.base, server.parts.folder / "new", r=4, seed=1, only=("q_proj",))
    shutil.rmtree(server.parts.folder / "one")
    (server.parts.folder / "new").rename(server.parts.folder / "one")
    assert server.client.post("/v1/adapters/reload").status_code == 200
    after = ask(server).json()
    assert after["digest"] != told["digest"] and after["modules"].keys() < told["modules"].keys()
    missing = ask(server, "on")
    assert missing.status_code == 404 and "did you mean" in missing.json()["error"]["message"]


def test_a_content_is_computed_once_and_holds_up_nobody(server, monkeypatch):
    begun, go, calls = threading.Event(), threading.Event(), []

    def slow(entry, base):
        calls.append(entry.name)
        begun.set()
        assert go.wait(30)
        yield from relative_changes(entry, base)

    monkeypatch.setattr(changes, "relative_changes", slow)
    with ThreadPoolExecutor(4) as visitors:
        asked = [visitors.submit(ask, server) for _ in range(4)]
        assert begun.wait(30)
        assert server.client.get("/v1/adapters/one").status_code == 200
        go.set()
        answers = [future.result().json() for future in asked]
    assert all(answer == answers[0] for answer in [*answers, ask(server).json()])
    assert calls == ["one"] and answers[0]["modules"]


def test_what_cannot_be_read_is_told_and_tried_again(server):
    while not server.parts.engine.kept:  # The engine reads the copy first.
        time.sleep(0.01)
    copy = server.parts.library.record("one").serving.snapshot.path
    copy.rename(copy.with_name("away"))
    for _ in range(2):
        gone = ask(server)
        said = gone.json()["error"]["message"]
        assert gone.status_code == 503 and said.startswith("the changes of one cannot be computed")
    copy.with_name("away").rename(copy)
    assert ask(server).status_code == 200
    (server.parts.folder / "bad").mkdir()
    (server.parts.folder / "bad" / "adapter_config.json").write_text("{}")
    server.client.post("/v1/adapters/reload")
    assert ask(server, "bad").status_code == 409
