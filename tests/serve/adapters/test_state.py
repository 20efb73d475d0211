"""Proves what outlives a restart: versions, rollbacks, pins and aliases; and that no damage to the
file of it, and no kill, stops a start or loses an adapter of the folder.

Needs no engine. Children are killed by their own process id.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import subprocess
import sys
import time

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from secura_serve import adapter as A
from secura_serve.errors import StorageError
from secura_serve.serve.app.adapters.content.snapshots import KEPT_DAYS, digest_of
from secura_serve.serve.app.adapters.content.verified import Verified
from tests.support import ROOT, warm
from tests.support.engines import random_adapter
from tests.support.lifecycle import files_of, house, pushed


@pytest.fixture(scope="module")
def base(tiny_base):
    return tiny_base("llama")


@pytest.fixture
def made(base, tmp_path):
    """A server with x (one content of its folder, then two pushed) and y."""
    parts = house(tmp_path, base)
    for seed, name in enumerate("xy"):
        random_adapter(base, parts.folder / name, r=4, seed=seed, only=("q_proj",))
    parts.fill()
    source = A.load(parts.folder / "x")

    async def push():
        return [await parts.updates.push("x", pushed(source, change)) for change in (2, 3)]

    parts.pushed = asyncio.run(push())
    return parts


def restarted(parts):
    again = house(parts.root, parts.base)
    again.fill()
    return again


def test_versions_pins_rollbacks_and_aliases_are_there_after_a_restart(made):
    two, three = (version.digest for version in made.pushed)

    async def decide():
        await made.updates.set_alias("stable", f"x@{two[:8]}")
        await made.updates.set_alias("latest", "x")
        await made.updates.pin("y", True)
        await made.updates.rollback("x", two)

    asyncio.run(decide())
    again = restarted(made)
    before, after = made.library.records, again.library.records
    for name in "xy":
        assert [(v.digest, v.origin) for v in after[name].versions] == [
            (v.digest, v.origin) for v in before[name].versions
        ]
        assert after[name].pinned == before[name].pinned
        assert after[name].serving.digest == before[name].serving.digest
    assert after["y"].pinned and after["x"].rolled_back_to == two
    assert again.library.aliases == {"stable": f"x@{two[:8]}", "latest": "x"}
    assert not again.said
    asyncio.run(again.updates.rollback("x", three))
    assert restarted(again).library.find("x").digest == three


def test_new_content_of_the_folder_wins_and_ends_a_rollback(made):
    asyncio.run(made.updates.rollback("x", made.pushed[0].digest))
    shutil.rmtree(made.folder / "x")
    random_adapter(made.base, made.folder / "x", r=4, seed=9, only=("q_proj",))
    again = restarted(made)
    record = again.library.records["x"]
    assert record.serving.digest == digest_of(made.folder / "x") and record.rolled_back_to is None
    assert [v.digest for v in record.versions[1:]] == [v.digest for v in made.pushed[::-1]]


def test_a_pushed_version_stays_the_newest(made):
    again = restarted(made)
    assert again.library.find("x").digest == made.pushed[-1].digest
    # However long the server ran before: what a start needs counts as used.
    old = time.time() - (KEPT_DAYS + 1) * 86400
    for copy in again.store.root.iterdir():
        os.utime(copy, (old, old))
    later = restarted(again)
    later.store.remove_unused()
    assert later.library.find("x").digest == made.pushed[-1].digest
    assert A.load(later.library.find("x").snapshot.path)


def test_a_folder_that_went_takes_its_versions_and_a_bad_one_leaves_them(made):
    shutil.rmtree(made.folder / "x")
    again = restarted(made)
    assert set(again.library.records) == {"y"}
    good = again.library.find("y").digest
    (made.folder / "y" / "adapter_model.safetensors").write_bytes(b"x")
    worse = restarted(again)
    assert worse.library.find("y").digest == good, "a bad update leaves the old one serving"
    assert "damaged" in worse.library.records["y"].refused
    asyncio.run(worse.updates.set_alias("a", "y"))
    assert restarted(worse).library.find("a").digest == good
    shutil.rmtree(made.folder / "y")
    assert not restarted(worse).library.records


def test_a_copy_that_is_gone_or_damaged_is_said_and_not_served(made):
    for version, damage in zip(made.pushed, (shutil.rmtree, _cut), strict=True):
        damage(version.snapshot.path)
    again = restarted(made)
    assert again.library.find("x").digest == digest_of(made.folder / "x")
    assert len(again.said) == 2 and all("is not served any more" in line for line in again.said)


def _cut(folder):
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])


def served_as_the_folder_is(parts, again):
    for name in "xy":
        kept = {version.digest for version in again.library.records[name].versions}
        assert digest_of(parts.folder / name) in kept, (name, again.said)


def test_a_truncated_state_stops_no_start(made):
    whole = made.updates.state.path.read_bytes()
    for length in range(0, len(whole), 13):
        made.updates.state.path.write_bytes(whole[:length])
        served_as_the_folder_is(made, restarted(made))


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.just([]),
    st.just({}),
    st.sampled_from([10**400, "../../x", "\x00", "a" * 5000, [[]], {"a": 1}, "0" * 32, "/"]),
)


def paths(value, at=()):
    yield at
    if isinstance(value, dict):
        for key in value:
            yield from paths(value[key], (*at, key))
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from paths(item, (*at, i))


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_a_state_with_any_other_values_stops_no_start(made, data):
    kept = made.root / "kept.json"
    if not kept.exists():
        asyncio.run(made.updates.set_alias("a", "x"))
        shutil.copy(made.updates.state.path, kept)
    raw = json.loads(kept.read_text())
    *above, last = data.draw(st.sampled_from([p for p in paths(raw) if p]))
    place = raw
    for key in above:
        place = place[key]
    place[last] = data.draw(VALUES)
    made.updates.state.path.write_text(json.dumps(raw))
    again = restarted(made)
    served_as_the_folder_is(made, again)
    again.updates.state.save(again.updates.state.encode(again.library))


@pytest.mark.parametrize(
    "text", ["", "[]", "null", "3", "{", "[" * 100_000, '{"format": 2}', "\x00", '{"adapters": 3}']
)
def test_a_file_that_is_no_state_is_said_and_not_used(made, text):
    made.updates.state.path.write_text(text)
    again = restarted(made)
    served_as_the_folder_is(made, again)
    assert "cannot be read and is not used" in again.said[0]
    # The same for what is remembered of verified files, which says nothing.
    folder = made.root / "verified"
    memory = Verified(folder, made.base)
    memory.remember("0" * 32, "identity", {"a": 1.0})
    memory.save()
    [file] = folder.iterdir()
    assert Verified(folder, made.base).identities == {"0" * 32: "identity"}
    for damaged in (text, json.dumps(json.loads(file.read_text()) | {"identities": 3})):
        file.write_text(damaged)
        assert Verified(folder, made.base).identities == {}
        memory._changed = True
        memory.save()


def test_a_full_disk_leaves_the_old_state(made, monkeypatch):
    before = made.updates.state.path.read_bytes()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StorageError, match="--state"):
        made.updates.state.save(made.updates.state.encode(made.library))
    # A decision stands all the same, and the operator is told.
    asyncio.run(made.updates.pin("y", True))
    assert "cannot be written" in made.said[-1] and made.library.records["y"].pinned
    monkeypatch.undo()
    assert made.updates.state.path.read_bytes() == before
    assert [p.name for p in made.updates.state.path.parent.iterdir()] == ["state.json"]


_WRITER = """
import sys
from pathlib import Path
from types import SimpleNamespace
from secura_serve.serve.app.adapters.library import Library, Record
from secura_serve.serve.app.adapters.state import StateFile
from secura_serve.serve.app.adapters.content.uploaded import write_folder
from tests.support.lifecycle import files_of
root = Path(sys.argv[1])
contents = [files_of(root / "contents" / name) for name in ("one", "two")]
versions = [[SimpleNamespace(digest=f"{i}" * 32, origin="push", created=1.0)] for i in (1, 2)]
state, library = StateFile(root / "state" / "state.json"), Library(["base"])
print("ready", flush=True)
i = 0
while True:
    i += 1
    write_folder(root / "adapters" / "x", contents[i % 2])
    library.records["x"] = Record(versions[i % 2])
    state.save(state.encode(library))
"""


@pytest.mark.long
def test_a_kill_at_any_moment_leaves_the_old_or_the_new(base, tmp_path):
    for seed, name in enumerate(("one", "two")):
        random_adapter(base, tmp_path / "contents" / name, r=4, seed=seed, only=("q_proj",))
    whole = [files_of(tmp_path / "contents" / name) for name in ("one", "two")]
    chance = random.Random(5)
    for _ in range(8):
        child = subprocess.Popen(
            [warm.python(), "-c", _WRITER, str(tmp_path)],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
            stdout=subprocess.PIPE,
        )
        try:
            assert child.stdout.readline() == b"ready\n"
            time.sleep(chance.uniform(0.005, 0.1))
        finally:
            # Until it is gone: what it still writes would be read below.
            warm.kill(child)
            child.stdout.close()
        if (tmp_path / "adapters" / "x").exists():
            assert files_of(tmp_path / "adapters" / "x") in whole
            assert A.load(tmp_path / "adapters" / "x")
        if (tmp_path / "state" / "state.json").exists():
            raw = json.loads((tmp_path / "state" / "state.json").read_text())
            assert raw["adapters"]["x"]["versions"][0]["digest"] in ("1" * 32, "2" * 32)
    assert (tmp_path / "state" / "state.json").exists()
    # Drafts of the killed are hidden: no start takes them for adapters.
    parts = house(tmp_path, base)
    parts.fill()
    assert set(parts.library.records) == {"x"} and parts.library.find("x") is not None
    assert torch.isfinite(next(iter(A.load(parts.folder / "x").modules.values())).U).all()
