"""Proves that the adapters folder is followed: what is whole is served, nothing half-written is,
and what goes is dropped.

Needs watchfiles (the real one, on real folders) and no engine: a stand-in reads what it is told to
prepare, as a worker does.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import time
from contextlib import asynccontextmanager

import pytest

from secura_serve import adapter as A
from secura_serve.errors import StorageError
from secura_serve.serve.app.adapters import watch as watching
from secura_serve.serve.app.adapters.content.snapshots import digest_of
from tests.support.engines import random_adapter
from tests.support.lifecycle import house

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
SOON_S = 1.0
"""How soon our own writers' rename is seen."""


@pytest.fixture(scope="module")
def base(tiny_base):
    return tiny_base("llama")


@pytest.fixture(scope="module")
def made(base, tmp_path_factory):
    """Ready adapters outside the folder that is watched; ``foreign`` names no digest."""
    root = tmp_path_factory.mktemp("made")
    for seed, name in enumerate(("one", "two", "foreign", "foreign2")):
        random_adapter(base, root / name, r=4, seed=seed, only=("q_proj",))
        if name.startswith("foreign"):
            raw = json.loads((root / name / CONFIG).read_text())
            del raw["weights_digest"]
            (root / name / CONFIG).write_text(json.dumps(raw))
    return root


@pytest.fixture
def parts(base, tmp_path):
    return house(tmp_path, base)


@asynccontextmanager
async def followed(parts):
    task = asyncio.ensure_future(parts.watch.run())
    await asyncio.sleep(0.3)
    try:
        yield
        assert not task.done(), "the watch has ended"
    finally:
        task.cancel()


async def until(condition, limit):
    begin = time.monotonic()
    while not condition():
        assert time.monotonic() - begin < limit, "it has not happened"
        await asyncio.sleep(0.01)
    return time.monotonic() - begin


def put(source, target):
    """Copy to a hidden draft, then rename, as our writers do."""
    draft = target.parent / f".{target.name}.draft"
    shutil.copytree(source, draft)
    if target.exists():
        target.rename(draft.with_suffix(".old"))
    draft.rename(target)
    shutil.rmtree(draft.with_suffix(".old"), ignore_errors=True)


def digest(parts, name):
    version = parts.library.find(name)
    return version and version.digest


@pytest.mark.long
def test_a_rename_is_seen_and_served_replaced_renamed_and_removed(parts, made):
    one, two = digest_of(made / "one"), digest_of(made / "two")

    async def run():
        async with followed(parts):
            put(made / "one", parts.folder / "x")
            await until(lambda: digest(parts, "x") == one, SOON_S)
            put(made / "two", parts.folder / "x")
            await until(lambda: digest(parts, "x") == two, SOON_S)
            first = parts.library.find(f"x@{one}")
            assert first is not None and first.number != parts.library.find("x").number
            (parts.folder / "x").rename(parts.folder / "y")
            await until(lambda: digest(parts, "y") == two and digest(parts, "x") is None, 6)
            shutil.rmtree(parts.folder / "y")
            await until(lambda: digest(parts, "y") is None, 6)
            await until(lambda: not parts.engine.kept, 1)
        assert not parts.library.records

    asyncio.run(run())


def test_a_folder_whose_end_was_not_reported_goes_too(parts, made, monkeypatch):
    monkeypatch.setattr(watching, "_ROOT_MS", 200)

    async def run():
        put(made / "one", parts.folder / "one")
        assert await parts.watch.reload() == {"one": "added"}
        # Before anything watches: of this nothing is ever reported.
        shutil.rmtree(parts.folder / "one")
        async with followed(parts):
            await until(lambda: digest(parts, "one") is None, 3 * watching.SETTLE_S)

    asyncio.run(run())


@pytest.mark.long
def test_a_foreign_copy_is_taken_once_it_has_settled(parts, made):
    """The configuration first, then the weights in pieces, each but the last incomplete."""
    weights = (made / "foreign" / WEIGHTS).read_bytes()

    async def run():
        async with followed(parts):
            folder = parts.folder / "x"
            folder.mkdir()
            shutil.copy(made / "foreign" / CONFIG, folder)
            with (folder / WEIGHTS).open("wb") as file:
                for part in range(6):
                    file.write(weights[part * len(weights) // 6 : (part + 1) * len(weights) // 6])
                    file.flush()
                    await asyncio.sleep(0.6)
                    assert not parts.library.records, "it was looked at half-written"
            await until(lambda: digest(parts, "x"), 4)
            assert digest(parts, "x") == digest_of(made / "foreign")
            assert any("as it has not changed for" in line for line in parts.said)

    asyncio.run(run())


@pytest.mark.long
def test_in_place_replacement_never_serves_a_mixture(parts, made):
    """Our files overwritten by a foreign copier: their digest says when they fit."""
    folder, seen = parts.folder / "x", set()
    put(made / "one", folder)
    parts.fill()

    async def run():
        async with followed(parts):
            shutil.copy(made / "two" / CONFIG, folder)
            begin = time.monotonic()
            while time.monotonic() - begin < 1.2:
                seen.add(digest(parts, "x"))
                await asyncio.sleep(0.02)
            (folder / WEIGHTS).write_bytes((made / "two" / WEIGHTS).read_bytes())
            await until(lambda: digest(parts, "x") == digest_of(made / "two"), 3)

    asyncio.run(run())
    assert seen == {digest_of(made / "one")}
    # Left half-way, it is refused, and the old one goes on.
    shutil.copy(made / "one" / CONFIG, folder)

    async def half():
        async with followed(parts):
            os.utime(folder / CONFIG)
            await until(lambda: parts.library.records["x"].refused, 5)

    asyncio.run(half())
    assert digest(parts, "x") == digest_of(made / "two")
    assert "is not the file that" in parts.library.records["x"].refused


def test_a_link_that_is_swapped_and_removed(parts, made, tmp_path):
    store = tmp_path / "elsewhere"
    for name in ("one", "two"):
        shutil.copytree(made / name, store / name)

    async def run():
        async with followed(parts):
            (parts.folder / "x").symlink_to(store / "one")
            await until(lambda: digest(parts, "x") == digest_of(made / "one"), SOON_S)
            (parts.folder / ".new").symlink_to(store / "two")
            os.replace(parts.folder / ".new", parts.folder / "x")
            await until(lambda: digest(parts, "x") == digest_of(made / "two"), SOON_S)
            shutil.rmtree(store / "two")
            await asyncio.sleep(0.3)
            assert digest(parts, "x") == digest_of(made / "two"), "what was verified is served"
            (parts.folder / "x").unlink()
            await until(lambda: digest(parts, "x") is None, 4)

    asyncio.run(run())


def test_deleting_a_link_leaves_what_it_leads_to(parts, made, tmp_path):
    shutil.copytree(made / "one", tmp_path / "elsewhere" / "x")
    (parts.folder / "x").symlink_to(tmp_path / "elsewhere" / "x")
    parts.fill()
    asyncio.run(parts.updates.delete("x"))
    assert not os.path.lexists(parts.folder / "x")
    assert A.load(tmp_path / "elsewhere" / "x")


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(watching, "SETTLE_S", 0.1)
    monkeypatch.setattr(watching, "_LOOK_S", 0.05)


def broken(folder, kind):
    weights, config = folder / WEIGHTS, folder / CONFIG
    if kind == "weights are a folder":
        weights.unlink()
        weights.mkdir()
    elif kind == "config is a folder":
        config.unlink()
        config.mkdir()
    elif kind == "weights lead nowhere":
        weights.unlink()
        weights.symlink_to(folder / "nothing")
    elif kind == "weights lead to themselves":
        weights.unlink()
        weights.symlink_to(weights)
    elif kind == "no weights":
        weights.unlink()
    elif kind == "no config":
        config.unlink()
    elif kind == "empty config":
        config.write_bytes(b"")
    elif kind == "config is no text":
        config.write_bytes(b"\xff\xfe")
    elif kind == "deep config":
        config.write_text("[" * 100_000)
    elif kind == "garbage_collection":
        weights.write_bytes(os.urandom(500))


KINDS = (
    "weights are a folder", "config is a folder", "weights lead nowhere", "no weights",
    "weights lead to themselves", "no config", "empty config", "config is no text",
    "deep config", "garbage_collection",
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_what_cannot_be_read_leaves_the_old_version(parts, made, kind, quick):
    put(made / "one", parts.folder / "x")
    put(made / "two", parts.folder / "y")
    parts.fill()
    broken(parts.folder / "x", kind)
    outcome = asyncio.run(parts.watch.reload())
    assert list(outcome) == ["x"] and outcome["x"] not in ("added", "updated", "removed")
    assert digest(parts, "x") == digest_of(made / "one")
    assert parts.library.records["x"].refused == outcome["x"]
    # Repaired, it is served again.
    put(made / "two", parts.folder / "x")
    assert asyncio.run(parts.watch.reload()) == {"x": "updated"}
    assert parts.library.records["x"].refused is None
    assert asyncio.run(parts.watch.reload()) == {}


def test_the_same_files_again_end_a_refusal(parts, made, quick):
    put(made / "one", parts.folder / "x")
    parts.fill()
    (parts.folder / "x" / WEIGHTS).unlink()
    asyncio.run(parts.watch.reload())
    assert parts.library.records["x"].refused
    put(made / "one", parts.folder / "x")
    asyncio.run(parts.watch.reload())
    assert digest(parts, "x") == digest_of(made / "one")
    assert parts.library.records["x"].refused is None, "the folder holds what is served"


@pytest.mark.parametrize("when", [-1e9, 0.0, 4e9, 1.6e10], ids=["1938", "1970", "2096", "2477"])
def test_clock_jumps_change_nothing(parts, made, when, quick):
    put(made / "one", parts.folder / "x")
    for name in (CONFIG, WEIGHTS):
        os.utime(parts.folder / "x" / name, (when, when))
    parts.fill()
    assert digest(parts, "x") == digest_of(made / "one")
    asyncio.run(parts.updates.set_alias("a", "x"))
    again = house(parts.root, parts.base)
    again.fill()
    assert not again.said and digest(again, "a") == digest_of(made / "one")
    assert asyncio.run(again.watch.reload()) == {}
    put(made / "two", parts.folder / "x")
    for name in (CONFIG, WEIGHTS):
        os.utime(parts.folder / "x" / name, (when, when))
    assert asyncio.run(again.watch.reload()) == {"x": "updated"}


@pytest.mark.parametrize("name", [b"a@b", b"a*2", b"a+b", b"a b", b"a\nb", b"\xff", b"base", b"-a"])
def test_folders_that_no_adapter_may_be_called_after(parts, made, name, quick):
    folder = os.path.join(os.fsencode(parts.folder), name)
    shutil.copytree(os.fsencode(made / "one"), folder)
    put(made / "one", parts.folder / "x")
    outcome = asyncio.run(parts.watch.reload())
    stored = os.fsdecode(name)
    shown = stored if stored.isprintable() else ascii(stored)
    assert outcome.pop("x") == "added" and set(outcome) == {shown}
    said = "base model's name" if name == b"base" else "have a meaning of their own"
    assert said in outcome[shown] and parts.library.find(stored) is None
    again = house(parts.root, parts.base)
    again.fill()
    assert again.library.find("x") and again.library.find(stored) is None
    shutil.rmtree(folder)
    asyncio.run(parts.watch.reload())
    assert set(parts.library.records) == {"x"}


def test_a_full_disk_is_told_and_leaves_the_old_version(parts, made, monkeypatch, quick):
    put(made / "one", parts.folder / "x")
    parts.fill()
    put(made / "two", parts.folder / "x")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("secura_serve.serve.app.adapters.content.snapshots.tempfile.mkdtemp", full)
    outcome = asyncio.run(parts.watch.reload())
    assert "No space left" in outcome["x"] and "SECURA_CACHE" in outcome["x"]
    assert digest(parts, "x") == digest_of(made / "one")
    monkeypatch.undo()
    assert asyncio.run(parts.watch.reload()) == {"x": "updated"}


def test_a_version_that_met_a_full_disk_is_served_once_there_is_room(
    parts, made, monkeypatch, quick
):
    monkeypatch.setattr(watching, "_FULL_DISK_S", 0.3)
    take, full, tries = parts.updates.verifier.store.take, [True], []

    def take_if_room(source):
        if full[0]:
            tries.append(source)
            raise StorageError(f"no space left for draft {len(tries)}")
        return take(source)

    monkeypatch.setattr(parts.updates.verifier.store, "take", take_if_room)

    async def run():
        async with followed(parts):
            put(made / "one", parts.folder / "x")
            await asyncio.sleep(1.5)
            warnings = [line for line in parts.said if "no space left" in line]
            assert len(tries) > 1
            assert len(warnings) == 1 and "tried again" in warnings[0]
            full[0] = False
            await until(lambda: digest(parts, "x") == digest_of(made / "one"), 3)

    asyncio.run(run())


def test_a_watch_outlives_whatever_is_wrong_with_one_folder(parts, made, quick, monkeypatch):
    monkeypatch.setattr(watching, "_RETRY_S", 0.2)

    async def run():
        async with followed(parts):
            # watchfiles gives up at a name that is no text.
            os.mkdir(os.path.join(os.fsencode(parts.folder), b"\xff"))
            (parts.folder / "a\nb").mkdir()
            (parts.folder / "empty").mkdir()
            (parts.folder / "file").write_text("x")
            await until(lambda: "empty" in parts.library.records, 3)
            put(made / "one", parts.folder / "x")
            await until(lambda: digest(parts, "x"), SOON_S + 1)
            assert all(line.isprintable() for line in parts.said), parts.said

    asyncio.run(run())
