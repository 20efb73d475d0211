"""Proves what ``push`` sends and what it does with the answers: U alone where the server has the
basis, the whole adapter where it has not, the model's numbers exactly, typed errors.

Needs torch, peft and loopback sockets: the server is a real one, but only takes notes. That
secura-serve serves what it is sent is proved in tests/serve.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, load_file

from secura_serve import ConfigError, PushError, adapter
from secura_serve.client import push
from secura_serve.train import adapter_layers
from tests.support.pushes import Receiver, error, parts, receiving
from tests.support.tuning import base, shake, tuned


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Receiver]:
    monkeypatch.delenv("SECURA_ADMIN_API_KEY", raising=False)
    with receiving() as receiver:
        yield receiver


def written(model: Any, folder: Path) -> adapter.Adapter:
    """The adapter as PEFT writes it."""
    model.save_pretrained(folder)
    return adapter.load(folder)


def knows(server: Receiver, name: str, folder: Path) -> None:
    server.bases[name] = adapter.base_id(adapter.load(folder))


@pytest.mark.parametrize("settings", [{}, {"core": "ab", "magnorm": {"mode": "published"}}])
def test_the_first_push_sends_the_whole_adapter(
    settings: dict[str, Any], server: Receiver, tmp_path: Path
) -> None:
    model = tuned(base(), **settings)
    done = push(model, server.url, "task")
    assert server.paths() == ["/v1/adapters/task/weights", "/v1/adapters/task"]
    assert done.whole and done.name == "task" and len(done.digest) == 32 and done.seconds > 0
    assert done.bytes_sent == sum(len(body) for _, _, body in server.requests)

    _, headers, body = server.requests[-1]
    received = tmp_path / "received"
    received.mkdir()
    for name, content in parts(headers, body).items():
        (received / name).write_bytes(content)
    saved = written(model, tmp_path / "saved")
    config = adapter.load(received).config
    assert config.weights_digest and replace(config, weights_digest=None) == replace(
        saved.config, weights_digest=None
    )
    ours, theirs = (load_file(f / "adapter_model.safetensors") for f in (received, saved.path))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("settings", [{}, {"core": "ab", "magnorm": {"mode": "published"}}])
def test_later_pushes_send_the_new_U_alone(
    settings: dict[str, Any], server: Receiver, tmp_path: Path
) -> None:
    model = tuned(base(), **settings)
    knows(server, "task", written(model, tmp_path / "before").path)
    shake(model, seed=2)
    done = push(model, f"{server.url}/v1/", "task")
    assert server.paths() == ["/v1/adapters/task/weights"]
    _, headers, body = server.requests[0]
    assert not done.whole and done.bytes_sent == len(body)
    assert headers["content-type"] == "application/octet-stream"
    norm = json.loads(headers["x-secura-magnorm"])
    assert norm == written(model, tmp_path / "after").config.magnorm.to_json()

    saved = load_file(tmp_path / "after" / "adapter_model.safetensors")
    expected = {k: v for k, v in saved.items() if not k.endswith(("rows", "cols"))}
    received = load(body)
    assert received.keys() == expected.keys()
    assert all(torch.equal(received[key], expected[key]) for key in received)


def test_another_basis_sends_the_whole_adapter(server: Receiver, tmp_path: Path) -> None:
    knows(server, "task", written(tuned(base()), tmp_path / "old").path)
    other = tuned(base(), selection={"rule": "inverse_sampled", "seed": 7})
    assert push(other, server.url, "task").whole
    assert len(server.requests) == 2


def test_a_base_that_changes_under_the_adapter_is_another_basis(tmp_path: Path) -> None:
    model = tuned(base())
    before = adapter.base_id(written(model, tmp_path / "a"))
    assert adapter.base_id(written(model, tmp_path / "b")) == before
    layer = next(iter(adapter_layers(model, "default").values()))
    with torch.no_grad():
        layer.get_base_layer().weight.mul_(2)
    assert adapter.base_id(written(model, tmp_path / "c")) != before


def test_folders_and_adapters_in_memory_are_pushed(server: Receiver, tmp_path: Path) -> None:
    folder = written(tuned(base()), tmp_path / "task").path
    (folder / "train.json").write_text('{"scores": {}}')
    push(folder, server.url, "from-folder")
    _, headers, body = server.requests[-1]
    sent = parts(headers, body)
    # PEFT writes a README.md of its own.
    assert sent == {f.name: f.read_bytes() for f in folder.iterdir()}

    loaded = adapter.load(folder)
    knows(server, "task", folder)
    for held in (loaded, loaded.without_weights(), str(folder)):
        server.requests.clear()
        assert not push(held, server.url, "task").whole
        [(_, _, body)] = server.requests
        got = load(body)
        for name, cur in loaded.modules.items():
            assert torch.equal(got[f"base_model.model.{name}.secura_U"], cur.U)


def test_the_admin_key_is_sent(server: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tuned(base())
    push(model, server.url, "task")
    assert "authorization" not in server.requests[-1][1]
    monkeypatch.setenv("SECURA_ADMIN_API_KEY", "of-the-shell")
    push(model, server.url, "task")
    assert server.requests[-1][1]["authorization"] == "Bearer of-the-shell"
    push(model, server.url, "task", api_key="given")
    assert server.requests[-1][1]["authorization"] == "Bearer given"


@pytest.mark.parametrize("status", [400, 401, 403, 413, 500, 501, 503])
def test_a_refusal_is_a_push_error(status: int, server: Receiver) -> None:
    server.refusals = [(status, error("because of this"))]
    with pytest.raises(PushError, match="because of this") as caught:
        push(tuned(base()), server.url, "task")
    assert (caught.value.status, caught.value.said) == (status, "because of this")
    assert len(server.requests) == 1


def test_a_refusal_of_the_whole_adapter_is_a_push_error(server: Receiver) -> None:
    server.refusals = [(404, error("unknown")), (409, error("folded"))]
    with pytest.raises(PushError, match="status 409: folded") as caught:
        push(tuned(base()), server.url, "task")
    assert caught.value.status == 409


@pytest.mark.parametrize("said", ["<html>proxy</html>", "[]", {"detail": "Not Found"}, {"id": 1}])
@pytest.mark.parametrize("status", [200, 404, 502])
def test_answers_of_something_else_are_push_errors(
    status: int, said: Any, server: Receiver
) -> None:
    server.refusals = [(status, said)] * 2
    with pytest.raises(PushError, match=str(status)) as caught:
        push(tuned(base()), server.url, "task")
    assert caught.value.status == status


def test_a_server_that_is_not_there_is_a_push_error() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(PushError, match="cannot be reached") as caught:
        push(tuned(base()), url, "task")
    assert caught.value.status is None


def test_a_server_that_does_not_answer_is_a_push_error() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(PushError, match="no answer within 0.2 s") as caught:
            push(tuned(base()), url, "task", timeout=0.2)
    assert caught.value.status is None


@pytest.mark.parametrize("endpoint", ["127.0.0.1:8000", "ftp://host", "http://", "http://a:b"])
def test_a_malformed_endpoint_is_a_config_error(endpoint: str) -> None:
    with pytest.raises(ConfigError, match="endpoint"):
        push(tuned(base()), endpoint, "task")


@pytest.mark.parametrize("name", ["", "a/b", "task@1", "a+b", "*", "..", "a\0b"])
def test_a_name_that_no_adapter_can_have_is_a_config_error(name: str) -> None:
    with pytest.raises(ConfigError, match="name"):
        push(tuned(base()), "http://127.0.0.1:9", name)


def test_what_cannot_be_sent_is_refused_before_anything_is(
    server: Receiver, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="no SECURA adapter 'other'"):
        push(tuned(base()), server.url, "task", adapter="other")
    with pytest.raises(ConfigError, match="no SECURA adapter"):
        push(base(), server.url, "task")
    with pytest.raises(ConfigError, match="ASCII"):
        push(tuned(base()), server.url, "task", api_key="ключ")
    with pytest.raises(adapter.store.AdapterFormatError):
        push(tmp_path / "nothing", server.url, "task")
    assert server.requests == []


def test_a_damaged_adapter_never_leaves_whole(server: Receiver, tmp_path: Path) -> None:
    loaded = written(tuned(base()), tmp_path / "task")
    modules = {name: replace(cur, U=cur.U * torch.nan) for name, cur in loaded.modules.items()}
    with pytest.raises(adapter.store.AdapterFormatError, match="NaN"):
        push(replace(loaded, modules=modules), server.url, "task")
    assert server.paths() == ["/v1/adapters/task/weights"]


def test_the_client_is_instant_to_import() -> None:
    code = (
        "import sys, secura_serve.client as c; assert 'torch' not in sys.modules; "
        "assert 'httpx' not in sys.modules; c.push; assert 'peft' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
