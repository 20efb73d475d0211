"""Proves what can be loaded while the server runs: checked folders below --adapters, nothing else.

Needs vLLM, but no engine: its table of models is real, the engine behind it a stand-in that
remembers what it was asked to load.
"""

from __future__ import annotations

import shutil
from functools import partial
from types import SimpleNamespace

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from secura_serve.method import MagNorm
from secura_serve.serve.app.adapters.snapshots import SnapshotStore
from secura_serve.serve.app.folding import Folding
from secura_serve.serve.app.http.loading import AdapterLoading
from secura_serve.serve.app.start import verified_copy
from tests.support.engines import random_adapter

pytest.importorskip("vllm")
LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"


class Engine:
    """In the engine's place: keeps what it is told to load, or refuses it as a worker does."""

    def __init__(self):
        self.model_config = SimpleNamespace(max_model_len=1, model="base")
        self.renderer = self.input_processor = None
        self.loaded, self.refuses, self.errored = [], None, False

    async def add_lora(self, request):
        if self.refuses:
            raise RuntimeError(self.refuses)
        self.loaded.append((request.lora_name, request.lora_int_id, request.lora_path))
        return True


@pytest.fixture(scope="module")
def made(tiny_base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    base = tiny_base("llama")
    random_adapter(base, folder / "sound", r=4, seed=1, only=("q_proj",))
    random_adapter(
        base, folder / "bounded", r=4, seed=2, only=("q_proj",), magnorm=MagNorm("bounded")
    )
    random_adapter(tiny_base("mistral"), folder / "other", r=4, seed=3, only=("q_proj",))
    return base, folder


@pytest.fixture
def server(made, tmp_path):
    from vllm.entrypoints.openai.models.protocol import BaseModelPath
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels
    from vllm.entrypoints.serve.exception_handling.register import init_exception_handler

    base, folder = made
    root = tmp_path / "adapters"
    shutil.copytree(folder, root)
    engine = Engine()
    models = OpenAIServingModels(engine, [BaseModelPath(name="base", model_path=str(base))])
    store = SnapshotStore(tmp_path / "copies")
    verify = partial(verified_copy, base=base, store=store)
    loading = AdapterLoading(root, ["base"], verify, Folding(base, ["base"], [], []))
    loading.bind(models)
    app = FastAPI()
    app.state.args = SimpleNamespace(log_error_stack=False)
    loading.attach(app)
    init_exception_handler(app)
    client = TestClient(app, raise_server_exceptions=False)

    def post(path, **body):
        answer = client.post(path, json=body)
        return answer.status_code, answer.text

    return SimpleNamespace(
        post=post, engine=engine, models=models, root=root, client=client, loading=loading
    )


def test_a_sound_adapter_is_loaded_replaced_and_unloaded(server):
    for path in ("sound", str(server.root / "sound"), f"{server.root}/../adapters/sound"):
        status, text = server.post(LOAD, lora_name="sound", lora_path=path)
        assert (status, text) == (200, "Success: LoRA adapter 'sound' added successfully.")
        assert list(server.models.lora_requests) == ["sound"]
        status, text = server.post(LOAD, lora_name="sound", lora_path=path)
        assert status == 400 and "load_inplace" in text
        assert server.post(LOAD, lora_name="sound", lora_path=path, load_inplace=True)[0] == 200
        status, text = server.post(UNLOAD, lora_name="sound")
        assert (status, text) == (200, "Success: LoRA adapter 'sound' removed successfully.")
        assert server.post(UNLOAD, lora_name="sound")[0] == 404
    numbers = [number for _, number, _ in server.engine.loaded]
    assert len(set(numbers)) == 6, "what runs under an old number would change its weights"
    # The content's own path: vLLM's prefix cache is keyed by it.
    (path,) = {path for *_, path in server.engine.loaded}
    assert path.startswith(str(server.root.parent / "copies")) and path.endswith("/sound")
    weights = server.root / "sound" / "adapter_config.json"
    weights.write_text(weights.read_text() + "\n")
    assert server.post(LOAD, lora_name="sound", lora_path="sound")[0] == 200
    changed = server.engine.loaded[-1][2]
    assert changed not in (path, str(server.root / "sound"))
    # A fold takes what is loaded, and nothing once it is unloaded.
    folding = server.loading.folding
    assert str(folding.paths["sound"]) == changed and folding.known("sound")
    assert server.post(UNLOAD, lora_name="sound")[0] == 200
    assert not folding.paths and not folding.snapshots


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../x",
        "a/b",
        "x\n",
        "\x00",
        "a" * 65,
        "a" * 5000,
        "base",
        "é",
        " sound",
        "-x",
    ],
)
def test_names_outside_the_rule_are_refused(server, name):
    for path, body in ((LOAD, {"lora_path": "sound"}), (UNLOAD, {})):
        status, text = server.post(path, lora_name=name, **body)
        assert 400 <= status < 500 and len(text) < 6000
    assert not server.engine.loaded and not server.models.lora_requests


def test_paths_outside_the_adapters_folder_are_refused(server, made, tmp_path, monkeypatch):
    outside = tmp_path / "outside"
    shutil.copytree(made[1] / "sound", outside / "sound")
    (server.root / "linked").symlink_to(outside / "sound")
    (server.root / "circle").symlink_to(server.root / "circle")
    shutil.copytree(made[1] / "sound", server.root / "borrowed")
    weights = server.root / "borrowed" / "adapter_model.safetensors"
    weights.unlink()
    weights.symlink_to(outside / "sound" / "adapter_model.safetensors")
    shutil.copytree(made[1] / "sound", server.root / "deep" / "sound")
    (server.root / "file").write_text("x")
    monkeypatch.chdir(outside)
    for name, path in (
        ("sound", str(outside / "sound")),
        ("sound", f"{server.root}/../outside/sound"),
        ("sound", "./sound/../../outside/sound"),
        ("sound", str(server.root / "deep" / "sound")),
        ("linked", "linked"),
        ("circle", "circle"),
        ("borrowed", "borrowed"),
        ("file", "file"),
        ("nothing", "nothing"),
        ("adapters", str(server.root)),
        ("adapters", "."),
        ("outside", ".."),
        ("etc", "/etc"),
        ("sound", "some-user/some-adapter"),
        ("sound", "https://example.invalid/sound"),
        ("sound", "x" * 5000),
        ("sound", "sound\x00"),
        ("sound", ""),
        ("other", "sound"),
    ):
        status, text = server.post(LOAD, lora_name=name, lora_path=path)
        assert status == 400 and len(text) < 800, (name, path)
    same = [
        server.post(LOAD, lora_name="x", lora_path=path)[1]
        for path in ("/etc/hostname", "/etc/no-such")
    ]
    assert same[0].replace("hostname", "no-such") == same[1], "it tells what exists"
    assert not server.engine.loaded


def test_what_the_start_would_refuse_is_refused(server):
    for name, said in (("other", "base"), ("bounded", "--fold"), ("empty", "is missing")):
        (server.root / "empty").mkdir(exist_ok=True)
        status, text = server.post(LOAD, lora_name=name, lora_path=name)
        assert status == 400 and said in text, text
    weights = server.root / "sound" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    assert server.post(LOAD, lora_name="sound", lora_path="sound")[0] == 400
    assert not server.engine.loaded


def test_what_the_engine_refuses_is_a_400_and_changes_nothing(server):
    assert server.post(LOAD, lora_name="sound", lora_path="sound")[0] == 200
    before = dict(server.models.lora_requests)
    server.engine.refuses = "no room"
    status, text = server.post(LOAD, lora_name="sound", lora_path="sound", load_inplace=True)
    assert status == 400 and "no room" in text
    assert server.models.lora_requests == before
    server.engine.errored = True
    assert server.post(LOAD, lora_name="sound", lora_path="sound", load_inplace=True)[0] == 503
    assert server.models.lora_requests == before


def test_malformed_requests_and_a_server_without_a_folder(server):
    for body in ({}, {"lora_name": "sound"}, {"lora_name": 3, "lora_path": []}, [], None, "x"):
        assert server.client.post(LOAD, json=body).status_code in (400, 422), body
    text = server.client.post(LOAD, content="x", headers={"content-type": "text/plain"})
    assert 400 <= text.status_code < 500
    server.loading.root = None
    status, text = server.post(LOAD, lora_name="sound", lora_path="sound")
    assert status == 400 and "without --adapters" in text
