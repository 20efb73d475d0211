"""Proves that whatever is sent to the adapters' routes is answered by 2xx, 4xx or 507, and that an
upload is served whole or changes nothing.

Needs vLLM and hypothesis, but no engine: vLLM's table of models is real, the engine behind it a
stand-in that reads what it is told to prepare, as a worker does.
"""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from secura_serve import adapter as A
from secura_serve.checkpoint import Checkpoint
from secura_serve.serve.app.adapters.content.snapshots import digest_of
from tests.support.engines import random_adapter
from tests.support.lifecycle import cores, files_of, house, multipart, serving_app

pytest.importorskip("vllm")
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture(scope="module")
def made(tiny_base, tmp_path_factory):
    folder, base = tmp_path_factory.mktemp("made"), tiny_base("llama")
    for seed, name in enumerate(("one", "two")):
        random_adapter(base, folder / name, r=4, seed=seed, only=("q_proj",))
    return SimpleNamespace(
        base=base,
        folder=folder,
        one=files_of(folder / "one"),
        base_shape=Checkpoint(base).shape,
        modules=list(A.load(folder / "one").modules),
    )


@pytest.fixture
def server(made, tmp_path):
    """A server that has ``one``."""
    parts = house(tmp_path, made.base)
    random_adapter(made.base, parts.folder / "one", r=4, seed=0, only=("q_proj",))
    parts.fill()
    with serving_app(parts) as app:
        yield SimpleNamespace(parts=parts, client=app.client, models=app.models)


def put(server, name, files):
    return server.client.put(f"/v1/adapters/{name}", files=multipart(files))


def test_an_upload_is_written_served_listed_rolled_back_and_deleted(server, made):
    card = b"# two\n\nAnswers in two words. Type:\n\n> Hello.\n>\n> Who?\n\n> Bye.\n"
    facts = {"config": {"lr": 0.01, "seed": 3, "out": "/home/ann/two", "init": ["no"]}}
    facts["evaluation"] = {
        "base": {"accuracy": 0.5},
        "seeds": {"3": {"accuracy": 0.75, "retention": {"kl": 0.25, "base_perplexity": 9}}},
    }
    two = files_of(made.folder / "two") | {"README.md": card}
    two["train.json"] = json.dumps(facts).encode()
    answer = put(server, "new", two)
    shown = answer.json()
    assert answer.status_code == 200 and shown["digest"] == digest_of(made.folder / "two")
    assert (shown["id"], shown["state"], shown["type"], shown["rank"]) == ("new", "known", "cur", 4)
    assert shown["task"] == "Answers in two words. Type:" and shown["reason"] is None
    assert shown["examples"] == ["Hello.\n\nWho?", "Bye."]
    assert shown["recipe"] == {"lr": 0.01, "seed": 3}
    assert shown["scores"] == {"accuracy": 0.75, "base_accuracy": 0.5}
    assert shown["retention"] == {"kl": 0.25}
    axes = sum(sum(made.base_shape(name)) for name in made.modules)
    assert shown["lora_size"] == 4 * 4 * axes
    assert [v["origin"] for v in shown["versions"]] == ["upload"]
    assert files_of(server.parts.folder / "new") == files_of(made.folder / "two")
    assert "new" in server.models.lora_requests
    assert put(server, "new", made.one).json()["digest"] == digest_of(made.folder / "one")
    assert len(server.client.get("/v1/adapters/new").json()["versions"]) == 2
    back = server.client.post("/v1/adapters/new/rollback").json()
    assert back["digest"] == shown["digest"] and back["rolled_back"]
    assert server.client.post("/v1/adapters/new/rollback").status_code == 409
    listed = server.client.get("/v1/adapters").json()
    assert listed["object"] == "list" and [a["id"] for a in listed["data"]] == ["one", "new"]
    assert server.client.delete("/v1/adapters/new").json()["deleted"]
    assert not (server.parts.folder / "new").exists() and "new" not in server.models.lora_requests
    for ask in (server.client.get, server.client.delete):
        assert ask("/v1/adapters/new").status_code == 404
    assert sorted(p.name for p in server.parts.folder.iterdir()) == ["one"]


def test_pins_and_aliases(server, made):
    client = server.client
    assert client.post("/v1/adapters/one/pin", json={"pinned": True}).json()["pinned"]
    assert client.get("/v1/adapters/one").json()["state"] in ("resident", "known")
    for name in ("p1", "p2", "p3"):
        put(server, name, files_of(made.folder / "two"))
    statuses = [client.post(f"/v1/adapters/{n}/pin").status_code for n in ("p1", "p2", "p3")]
    assert statuses == [200, 200, 409]
    # The pin follows the name to its next version.
    put(server, "one", files_of(made.folder / "two"))
    serving = server.parts.library.find("one")
    assert serving.number in server.parts.engine.pinned and len(server.parts.engine.pinned) == 3
    digest = serving.digest
    assert client.put("/v1/aliases/a", json={"adapter": f"one@{digest[:6]}"}).status_code == 200
    assert "a" in server.models.lora_requests
    assert client.get("/v1/adapters/one").json()["aliases"] == {"a": f"one@{digest[:6]}"}
    assert put(server, "a", made.one).status_code == 400
    for alias, target in (("one", "one"), ("base", "one"), ("a@b", "one"), ("b", "no"), ("b", "a")):
        status = client.put(f"/v1/aliases/{alias}", json={"adapter": target}).status_code
        assert status in (400, 404), (alias, target)
    assert client.delete("/v1/aliases/a").status_code == 200
    assert client.delete("/v1/aliases/a").status_code == 404


def test_what_is_no_upload_is_refused_and_changes_nothing(server, made):
    one = made.one
    bad = {
        "no weights": {CONFIG: one[CONFIG]},
        "no config": {WEIGHTS: one[WEIGHTS]},
        "a third file": one | {"evil.py": b"x"},
        "a path": one | {"../../evil": b"x"},
        "mixture": one | {WEIGHTS: files_of(made.folder / "two")[WEIGHTS]},
        "truncated": one | {WEIGHTS: one[WEIGHTS][:-1]},
    }
    for kind, files in bad.items():
        for name in ("new", "one"):
            answer = put(server, name, files)
            assert answer.status_code == 400 and "error" in answer.json(), (kind, answer.text)
    for name in ("base", "a@b", "a*2", "a+b", "-a", ".a", "a%00", "a%20b", "%0a", "x" * 65, "é"):
        assert put(server, name, one).status_code == 400, name
    for body, kind in ((b"", "multipart/form-data"), (b"x", "multipart/form-data; boundary=x")):
        answer = server.client.put("/v1/adapters/new", content=body, headers={"content-type": kind})
        assert answer.status_code == 400, answer.text
    assert server.client.put("/v1/adapters/new", json={}).status_code == 400
    assert_unchanged(server, made)


def assert_unchanged(server, made):
    assert set(server.parts.library.records) == {"one"}
    record = server.parts.library.records["one"]
    assert [v.digest for v in record.versions] == [digest_of(made.folder / "one")]
    assert [p.name for p in server.parts.folder.iterdir()] == ["one"]
    assert files_of(server.parts.folder / "one") == made.one
    assert list(server.models.lora_requests) == ["one"]


def test_a_full_disk_is_a_507_and_a_worker_s_refusal_a_400(server, made, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    two = files_of(made.folder / "two")
    for name in ("one", "new"):
        answer = put(server, name, two)
        assert answer.status_code == 507, answer.text
        assert answer.json()["error"]["type"] == "InsufficientStorageError"
    monkeypatch.undo()
    # Full only once the copy is made: the folder is not written.
    with monkeypatch.context() as patch:
        patch.setattr("secura_serve.system.atomic.tempfile.mkdtemp", _full_for(server.parts.folder))
        assert put(server, "one", two).status_code == 507
        assert put(server, "new", two).status_code == 507
    server.parts.engine.refuses = "no room"
    for name in ("one", "new"):
        answer = put(server, name, two)
        assert answer.status_code == 400 and "no room" in answer.text
    assert_unchanged(server, made)
    server.parts.engine.refuses = None
    assert put(server, "one", two).status_code == 200


def _full_for(folder):
    import tempfile

    make = tempfile.mkdtemp

    def mkdtemp(*args, **how):
        if how.get("dir") == folder:
            raise OSError(28, "No space left on device")
        return make(*args, **how)

    return mkdtemp


def test_names_that_are_no_text_do_not_break_the_list(server):
    os.mkdir(os.path.join(os.fsencode(server.parts.folder), b"\xff\n"))
    assert server.client.post("/v1/adapters/reload").status_code == 200
    answer = server.client.get("/v1/adapters")
    assert answer.status_code == 200 and len(answer.json()["data"]) == 2
    assert {a["state"] for a in answer.json()["data"]} == {"known", "refused"}


# Fuzzing. What was made by chance is sent to one server, which must then be as it was.

CONTENT = st.one_of(st.binary(max_size=200), st.just(b""), st.just(b"{}"))
VALUES = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),
        st.text(max_size=10),
        st.sampled_from([10**400, 2**63, -1, 0, "u", "ab", "auto", "\x00", "\ud800", "../x"]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)
NAMES = st.one_of(
    st.text(max_size=12),
    st.sampled_from(["new", "one", "base", "a@b", "..", ".", "%00", "%2F", "reload", "x" * 70]),
)
DTYPES = ["F64", "F32", "F16", "BF16", "F8_E5M2", "F8_E4M3", "I64", "I32", "I8", "U8", "BOOL"]
DTYPES += ["F4", "F6_E2M3", "F8_E8M0", "C64", "U64", "x", ""]
MODULE = "base_model.model.model.layers.0.self_attn.q_proj.secura_"
KEYS = st.sampled_from([MODULE + k for k in ("U", "rows", "cols", "rho_max", "A")] + ["x", ""])

LORA = {
    f"base_model.model.model.layers.0.self_attn.q_proj.lora_{side}.weight": torch.zeros(4, 4)
    for side in "AB"
}


@st.composite
def safetensors(draw, whole):
    """A weights file: the real one with bytes changed or cut, or a header made by chance."""
    kind = draw(st.integers(0, 3))
    if kind == 0:
        at = draw(st.integers(0, len(whole) - 1))
        return whole[:at] + draw(st.binary(max_size=9)) + whole[at + draw(st.integers(0, 9)) :]
    size = draw(st.integers(0, 200))
    offsets = st.lists(st.integers(-1, 300), max_size=3)
    tensor = st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(DTYPES),
            "shape": st.lists(st.one_of(st.integers(-1, 5), st.just(2**62)), max_size=3),
            "data_offsets": offsets,
        }
    )
    header = draw(st.one_of(st.dictionaries(KEYS, st.one_of(tensor, VALUES), max_size=4), VALUES))
    text = json.dumps(header).encode()
    length = len(text) if kind == 1 else draw(st.integers(0, 2**64 - 1))
    return struct.pack("<Q", length) + text + b"\0" * size


@st.composite
def tensors(draw, sound):
    """U of the right names with any dtype, shape or value, packed as safetensors packs them."""
    made = dict(sound)
    for key in draw(st.lists(st.sampled_from([*sorted(made), MODULE + "rho_max"]), max_size=3)):
        dtype = draw(
            st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64,
                             torch.float8_e4m3fn, torch.float8_e5m2, torch.int32, torch.int64,
                             torch.bool, torch.uint8, torch.complex64])
        )  # fmt: skip
        shape = draw(st.lists(st.integers(0, 5), max_size=3).map(tuple))
        value = draw(st.sampled_from([0.0, 1.0, -1.0, 1e30, 1e300, float("inf"), float("nan")]))
        if not (dtype.is_floating_point or dtype.is_complex):
            value = 1
        wide = torch.full(draw(st.sampled_from([(4, 4), shape])), value, dtype=torch.float64)
        made[key] = wide.to(dtype)
    if draw(st.booleans()):
        made.pop(draw(st.sampled_from(sorted(made))))
    return save(made)


@st.composite
def configs(draw, whole):
    """The real configuration with values changed, or no configuration at all."""
    if draw(st.integers(0, 4)) == 0:
        return draw(st.one_of(CONTENT, VALUES.map(lambda v: json.dumps(v).encode())))
    raw = json.loads(whole)
    for key in draw(st.lists(st.sampled_from([*raw, "magnorm", "x"]), min_size=1, max_size=3)):
        if draw(st.booleans()):
            raw[key] = draw(VALUES)
        else:
            raw.pop(key, None)
    return json.dumps(raw).encode()


def allowed(answer):
    status = answer.status_code
    assert 200 <= status < 300 or 400 <= status < 500 or status == 507, (status, answer.text)
    assert "Traceback" not in answer.text
    return status


def nothing_half_installed(server, made):
    """Whatever is served can be read whole, is on disk, and the engine has read the same."""
    parts = server.parts
    for version in parts.library:
        adapter = A.load(version.snapshot.path)
        kept = parts.engine.kept[str(version.snapshot.path)]
        for name, cur in adapter.modules.items():
            assert torch.equal(cur.U, kept.modules[name].U) and torch.isfinite(cur.U).all()
    for folder in parts.folder.iterdir():
        assert not folder.name.startswith("."), "a draft was left"
        assert A.load(folder) and folder.name in parts.library.records
    assert parts.library.find("one") is not None


def fuzz(server, made, data):
    name = data.draw(NAMES)
    client, url = server.client, f"/v1/adapters/{_quoted(name)}"
    kind = data.draw(st.integers(0, 6))
    if kind == 0:
        files = {
            CONFIG: data.draw(st.one_of(st.just(made.one[CONFIG]), configs(made.one[CONFIG]))),
            WEIGHTS: data.draw(safetensors(made.one[WEIGHTS])),
        }
        allowed(client.put(url, files=multipart(files)))
    elif kind == 1:
        files = made.one | {CONFIG: data.draw(configs(made.one[CONFIG]))}
        allowed(client.put(url, files=multipart(files)))
    elif kind == 2:
        # No digest is named, so that the tensors themselves are looked at.
        raw = json.loads(made.one[CONFIG])
        raw.pop("weights_digest")
        weights = data.draw(tensors(load(made.one[WEIGHTS])))
        if data.draw(st.booleans()):
            raw = {"peft_type": "LORA", "r": data.draw(VALUES), "lora_alpha": 4} | data.draw(
                st.dictionaries(st.sampled_from(["r", "rank_pattern", "alpha_pattern"]), VALUES)
            )
            weights = data.draw(tensors(LORA))
        files = {CONFIG: json.dumps(raw).encode(), WEIGHTS: weights}
        allowed(client.put(url, files=multipart(files)))
    elif kind == 3:
        boundary = data.draw(st.sampled_from(["x", "", '"', "x; charset=no", "x" * 300]))
        body = data.draw(
            st.lists(
                st.sampled_from(
                    [b"--x\r\n", b"--x--\r\n", b"\r\n", b"\r\n\r\n", b"a", b"\xff", b"\0",
                     b'Content-Disposition: form-data; name="f"; filename="adapter_config.json"',
                     b"Content-Disposition: form-data", b'Content-Disposition: ; name="f"',
                     b"Content-Type: text/plain; charset=no", b"Content-Transfer-Encoding: base64",
                     b"{}"]
                ), max_size=12,
            ).map(b"".join)
        )  # fmt: skip
        headers = {"content-type": f"multipart/form-data; boundary={boundary}"}
        allowed(client.put(url, content=body, headers=headers))
    elif kind == 4:
        sound = cores(A.load(made.folder / "one"))
        weights = st.one_of(tensors(sound), safetensors(save(sound)), CONTENT)
        target = data.draw(st.sampled_from(["/v1/adapters/one", url]))
        headers = data.draw(st.sampled_from([{}, {}, {"x-secura-basis": "x"}]))
        allowed(client.put(f"{target}/weights", content=data.draw(weights), headers=headers))
    elif kind == 5:
        path, field = data.draw(
            st.sampled_from(
                [(f"{url}/rollback", "version"), (f"{url}/pin", "pinned"),
                 ("/v1/adapters/one/rollback", "version"), ("/v1/adapters/one/pin", "pinned"),
                 ("/v1/load_lora_adapter", "lora_name"), ("/v1/unload_lora_adapter", "lora_name")]
            )
        )  # fmt: skip
        body = {field: data.draw(VALUES)}
        if field == "lora_name":
            body |= {"lora_name": name, "lora_path": data.draw(st.one_of(VALUES, NAMES))}
            if name == "one":
                return
        content = json.dumps(body).encode()
        headers = {"content-type": "application/json"}
        allowed(client.post(path, content=content, headers=headers))
    else:
        alias = f"/v1/aliases/{_quoted(name)}"
        content = json.dumps({"adapter": data.draw(st.one_of(VALUES, NAMES))}).encode()
        headers = {"content-type": "application/json"}
        allowed(client.put(alias, content=content, headers=headers))
        allowed(client.delete(alias))
    if name != "one":
        allowed(client.get(url))
        allowed(client.delete(url))
    nothing_half_installed(server, made)


def _quoted(name):
    from urllib.parse import quote

    return quote(name.encode("utf-8", "surrogatepass"), safe="%")


QUICK = {"deadline": None, "suppress_health_check": list(HealthCheck)}


@pytest.mark.long
@settings(max_examples=300, **QUICK)
@given(data=st.data())
def test_hundreds_of_requests_made_by_chance(server, made, data):
    fuzz(server, made, data)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@settings(max_examples=10_000, **QUICK)
@given(data=st.data())
def test_ten_thousand_requests_made_by_chance(server, made, data):
    fuzz(server, made, data)
