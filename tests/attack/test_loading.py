"""Proves what can be loaded by vLLM's route: checked folders below --adapters, nothing else.

Needs vLLM, but no engine: its table of models is real, the engine behind it a stand-in that
remembers what it was asked to prepare (``tests/support/lifecycle.py``).
"""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import pytest

from secura_serve.method import MagNorm
from tests.support.engines import random_adapter
from tests.support.lifecycle import house, serving_app

pytest.importorskip("vllm")
LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"


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
    base, folder = made
    parts = house(tmp_path, base)
    shutil.copytree(folder, parts.folder, dirs_exist_ok=True)
    with serving_app(parts) as app:

        def post(path, **body):
            answer = app.client.post(path, json=body)
            return answer.status_code, answer.text

        yield SimpleNamespace(
            post=post,
            engine=parts.engine,
            models=app.models,
            root=parts.folder,
            client=app.client,
            parts=parts,
            folding=app.folding,
        )


def test_a_sound_adapter_is_loaded_replaced_and_unloaded(server):
    numbers, paths = [], []

    def loaded():
        request = server.models.lora_requests["sound"]
        numbers.append(request.lora_int_id)
        paths.append(request.lora_path)
        assert request.lora_path in server.engine.kept, "the engine has not read it"

    for path in ("sound", str(server.root / "sound"), f"{server.root}/../adapters/sound"):
        status, text = server.post(LOAD, lora_name="sound", lora_path=path)
        assert (status, text) == (200, "Success: LoRA adapter 'sound' added successfully.")
        assert list(server.models.lora_requests) == ["sound"]
        loaded()
        status, text = server.post(LOAD, lora_name="sound", lora_path=path)
        assert status == 400 and "load_inplace" in text
        assert server.post(LOAD, lora_name="sound", lora_path=path, load_inplace=True)[0] == 200
        status, text = server.post(UNLOAD, lora_name="sound")
        assert (status, text) == (200, "Success: LoRA adapter 'sound' removed successfully.")
        assert server.post(UNLOAD, lora_name="sound")[0] == 404
    assert len(set(numbers)) == 3, "what runs under an old number would change its weights"
    # The content's own path: vLLM's prefix cache is keyed by it.
    (path,) = set(paths)
    assert path.startswith(str(server.root.parent / "copies")) and path.endswith("/sound")
    weights = server.root / "sound" / "adapter_config.json"
    weights.write_text(weights.read_text() + "\n")
    assert server.post(LOAD, lora_name="sound", lora_path="sound")[0] == 200
    loaded()
    changed = paths[-1]
    assert changed not in (path, str(server.root / "sound"))
    # In place: requests that run keep the old version's number.
    weights.write_text(weights.read_text() + "\n")
    assert server.post(LOAD, lora_name="sound", lora_path="sound", load_inplace=True)[0] == 200
    loaded()
    assert len(set(numbers)) == 5 and len(set(paths)) == 3
    # A fold takes what is loaded, and nothing once it is unloaded.
    folding, answers = server.folding, server.folding.answers
    assert str(answers.library.find("sound").snapshot.path) == paths[-1] and answers.known("sound")
    assert server.post(UNLOAD, lora_name="sound")[0] == 200
    assert not answers.known("sound") and not folding.foldable()
    assert (server.root / "sound").is_dir(), "unloading leaves the folder"


def test_unloading_frees_the_slot_and_what_was_kept(server):
    assert server.post(LOAD, lora_name="sound", lora_path="sound")[0] == 200
    request = server.models.lora_requests["sound"]
    assert server.post(UNLOAD, lora_name="sound")[0] == 200
    assert server.engine.called("secura_forget") == [([request.lora_int_id], [request.lora_path])]
    assert not server.engine.kept


def test_loading_works_while_another_adapter_is_folded(server):
    server.folding.answers.folded = "elsewhere"
    assert server.post(LOAD, lora_name="sound", lora_path="sound")[0] == 200
    assert server.folding.answers.refusal("sound").status == 409
    server.folding.answers.folded = None
    assert server.folding.answers.refusal("sound") is None


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
    assert not server.engine.calls and not server.models.lora_requests


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
    assert not server.engine.calls and not server.models.lora_requests


def test_what_the_start_would_refuse_is_refused(server):
    for name, said in (("other", "base"), ("bounded", "/admin/fold"), ("empty", "is missing")):
        (server.root / "empty").mkdir(exist_ok=True)
        status, text = server.post(LOAD, lora_name=name, lora_path=name)
        assert status == 400 and said in text, text
    weights = server.root / "sound" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    assert server.post(LOAD, lora_name="sound", lora_path="sound")[0] == 400
    assert not server.engine.calls and not server.models.lora_requests
    # One that must be folded is known from now on, and answers once it is.
    assert server.folding.answers.status("bounded") == "unfolded" and server.folding.foldable()


def test_what_the_engine_refuses_is_a_400_and_changes_nothing(server):
    from vllm.v1.engine.exceptions import EngineDeadError

    assert server.post(LOAD, lora_name="sound", lora_path="sound")[0] == 200
    before = dict(server.models.lora_requests)
    config = server.root / "sound" / "adapter_config.json"
    config.write_text(config.read_text() + "\n")
    server.engine.refuses = "no room"
    status, text = server.post(LOAD, lora_name="sound", lora_path="sound", load_inplace=True)
    assert status == 400 and "no room" in text
    assert server.models.lora_requests == before
    server.engine.raises = EngineDeadError()
    status, text = server.post(LOAD, lora_name="sound", lora_path="sound", load_inplace=True)
    assert status in (500, 503), text
    assert server.models.lora_requests == before


def test_malformed_requests_and_a_server_without_a_folder(server):
    for body in ({}, {"lora_name": "sound"}, {"lora_name": 3, "lora_path": []}, [], None, "x"):
        assert server.client.post(LOAD, json=body).status_code in (400, 422), body
    text = server.client.post(LOAD, content="x", headers={"content-type": "text/plain"})
    assert 400 <= text.status_code < 500
    server.parts.updates.root = None
    status, text = server.post(LOAD, lora_name="sound", lora_path="sound")
    assert status == 400 and "without --adapters" in text
