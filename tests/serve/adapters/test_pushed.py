"""Proves that a trainer's push of U is the adapter that a folder with the same U would be, and that
what does not fit changes nothing.

Needs no engine: a stand-in reads what it is told to prepare, as a worker does.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from secura_serve import adapter as A
from secura_serve.errors import AdapterError, LifecycleError, SecuraError
from secura_serve.method import MagNorm
from secura_serve.serve.basis import base_id
from tests.support.engines import random_adapter
from tests.support.lifecycle import cores, files_of, house, pushed


@pytest.fixture(scope="module")
def base(tiny_base):
    return tiny_base("llama")


@pytest.fixture
def made(base, tmp_path):
    parts = house(tmp_path, base)
    random_adapter(base, parts.folder / "x", r=4, seed=1, only=("q_proj", "v_proj"))
    parts.fill()
    return parts


def push(parts, name, body, basis=None):
    return asyncio.run(parts.updates.push(name, body, basis))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_push_equals_the_folder_with_the_same_u(made, tmp_path, dtype):
    source = A.load(made.folder / "x")
    modules = {n: replace(c, U=(c.U * 1.7).to(dtype)) for n, c in source.modules.items()}
    folder = A.save(tmp_path / "twin" / "x", source.config, modules)
    body = save({k: (t * 1.7).to(dtype) for k, t in cores(source).items()})
    version = push(made, "x", body, base_id(source))
    twin, served = A.load(folder), made.serving("x")
    assert version is made.library.find("x") and version.origin == "push"
    assert set(served.modules) == set(twin.modules)
    for name, cur in twin.modules.items():
        other = served.modules[name]
        assert torch.equal(other.U, cur.U) and other.U.dtype == dtype
        assert torch.equal(other.rows, cur.rows) and torch.equal(other.cols, cur.cols)
        assert other.rows.dtype == cur.rows.dtype
    assert replace(served.config, weights_digest=None) == replace(twin.config, weights_digest=None)
    assert base_id(served) == base_id(twin)
    # The folder is the operator's, and stays as it is.
    assert A.load(made.folder / "x").modules.keys() == source.modules.keys()
    assert len(made.library.records["x"].versions) == 2


def test_pushed_bytes_do_not_depend_on_the_order_of_the_tensors(made):
    source = A.load(made.folder / "x")
    tensors = cores(source, 2)
    first = push(made, "x", save(tensors))
    again = push(made, "x", save(dict(reversed(tensors.items())), metadata={"by": "another"}))
    assert first is again


def test_a_magnorm_with_rho_max_is_pushed_with_it(base, tmp_path):
    parts = house(tmp_path, base)
    plain = A.load(random_adapter(base, tmp_path / "made" / "p", r=4, seed=1, only=("q_proj",)))
    modules = {n: replace(c, rho_max=1.5) for n, c in plain.modules.items()}
    config = replace(plain.config, magnorm=MagNorm("published"))
    A.save(parts.folder / "p", config, modules)
    parts.fill()
    tensors = cores(plain, 2)
    with pytest.raises(LifecycleError, match="needs secura_rho_max") as refused:
        push(parts, "p", save(tensors))
    assert refused.value.status == 409
    rho = {k.replace("secura_U", "secura_rho_max"): torch.tensor(2.5) for k in tensors}
    version = push(parts, "p", save(tensors | rho))
    assert {c.rho_max for c in A.load(version.snapshot.path).modules.values()} == {2.5}


def _without_one(tensors):
    tensors.pop(next(iter(tensors)))


def _one_more(tensors):
    tensors["base_model.model.model.layers.0.mlp.up_proj.secura_U"] = torch.zeros(4, 4)


def _first(value):
    return lambda tensors: tensors.update({next(iter(tensors)): value})


def _first_number(value):
    return lambda tensors: next(iter(tensors.values()))[0, 0].fill_(value)


def _rows(tensors):
    key = next(iter(tensors)).replace("secura_U", "secura_rows")
    tensors[key] = torch.arange(4, dtype=torch.int32)


def _renamed(tensors):
    for key in list(tensors):
        tensors[key.removeprefix("base_model.model.")] = tensors.pop(key)


BAD = {
    "no module": (dict.clear, 409),
    "a module is missing": (_without_one, 409),
    "a module too many": (_one_more, 409),
    "another rank": (_first(torch.zeros(5, 5)), 409),
    "not square": (_first(torch.zeros(4, 3)), 409),
    "a vector": (_first(torch.zeros(4)), 409),
    "a scalar": (_first(torch.tensor(1.0)), 409),
    "empty": (_first(torch.zeros(0, 0)), 409),
    "integers": (_first(torch.zeros(4, 4, dtype=torch.int32)), 409),
    "complex": (_first(torch.zeros(4, 4, dtype=torch.complex64)), 409),
    "other names": (_renamed, 409),
    "a stranger": (lambda t: t.update({"evil": torch.zeros(1)}), 409),
    "rows of another basis": (_rows, 400),
    "NaN": (_first_number(torch.nan), 400),
    "infinity": (_first_number(torch.inf), 400),
    "too large": (_first_number(3e38), 400),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_does_not_fit_is_refused_and_changes_nothing(made, kind):
    change, status = BAD[kind]
    tensors = cores(A.load(made.folder / "x"))
    change(tensors)
    assert_refused(made, save(tensors), status)


def assert_refused(parts, body, status, basis=None):
    before, files = parts.library.find("x"), files_of(parts.folder / "x")
    with pytest.raises(SecuraError) as refused:
        push(parts, "x", body, basis)
    error = refused.value
    got = error.status if isinstance(error, LifecycleError) else 400
    assert got == status and (isinstance(error, (LifecycleError, AdapterError))), error
    assert parts.library.find("x") is before and len(parts.library.records["x"].versions) == 1
    assert files_of(parts.folder / "x") == files and not parts.engine.calls
    assert len(str(error)) < 2000


@pytest.mark.parametrize(
    "body", [b"", b"x", b"\0" * 8, b"\xff" * 64, b"\x02" + b"\0" * 7 + b"{}", b"PK\x03\x04" * 9]
)
def test_garbage_is_a_400(made, body):
    # A file without tensors is one; it lacks every module.
    assert_refused(made, body, 409 if body.endswith(b"{}") else 400)


def test_truncation_anywhere_is_a_400(made):
    body = pushed(A.load(made.folder / "x"))
    for length in range(0, len(body), 29):
        assert_refused(made, body[:length], 400)


def test_another_basis_is_a_409(made, base, tmp_path):
    other = A.load(random_adapter(base, tmp_path / "o" / "x", r=4, seed=7, only=("k_proj",)))
    assert_refused(made, pushed(other), 409)
    source = A.load(made.folder / "x")
    for basis in (base_id(other), "", "x" * 5000):
        assert_refused(made, pushed(source), 409, basis)


def test_an_unknown_name_is_a_404(made):
    for name in ("nobody", "base", "x@123456"):
        with pytest.raises(LifecycleError) as refused:
            push(made, name, b"")
        assert refused.value.status == 404


def test_a_worker_s_refusal_and_a_full_disk_leave_the_old_one(made, monkeypatch):
    body = pushed(A.load(made.folder / "x"), 2)
    before = made.library.find("x")
    made.engine.refuses = "no room"
    with pytest.raises(AdapterError, match="no room"):
        push(made, "x", body)
    made.engine.refuses = None

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(SecuraError, match="SECURA_CACHE"):
        push(made, "x", pushed(A.load(made.folder / "x"), 3))
    monkeypatch.undo()
    assert made.library.find("x") is before
    assert not [p for p in made.store.root.iterdir() if p.name.startswith(".")]
    assert push(made, "x", body) is made.library.find("x")


def test_many_pushes_keep_n_versions_on_workers_and_disk(made):
    source = A.load(made.folder / "x")

    async def train():
        running = asyncio.get_running_loop().create_future()

        async def ended():
            await running

        made.updates.retirement.ended = ended
        pushes = [await made.updates.push("x", pushed(source, i)) for i in range(2, 9)]
        kept_while_running = sorted(p.name for p in made.store.root.iterdir())
        # The oldest content comes back before the requests that ran have ended.
        back = await made.updates.push("x", pushed(source, 2))
        running.set_result(None)
        while made.updates.retirement.running:
            await asyncio.sleep(0.01)
        return pushes, back, kept_while_running

    pushes, back, kept_while_running = asyncio.run(train())
    assert {v.digest for v in pushes} <= set(kept_while_running)
    versions = made.library.records["x"].versions
    assert versions[0] is back and len(versions) == 3
    assert A.load(back.snapshot.path), "its copy went with the one of the retired version"
    assert str(back.snapshot.path) in made.engine.kept
    assert set(made.engine.kept) == {str(v.snapshot.path) for v in versions}
    forgotten = {n for numbers, _ in made.engine.called("secura_forget") for n in numbers}
    assert forgotten.isdisjoint(v.number for v in versions) and len(forgotten) == 5
    on_disk = {p.name for p in made.store.root.iterdir()}
    assert on_disk >= {v.digest for v in versions} and len(on_disk) <= 4
