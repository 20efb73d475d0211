"""Replays what an attack on the adapters' life cycle found: versions that a restart forgot, content
that went while a request waited for it, names given twice, folds and deletions that crossed.

Needs no engine: a stand-in reads what it is told to prepare, as a worker does.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from pathlib import Path

import pytest

from secura_serve import adapter as A
from secura_serve.errors import ConfigError, LifecycleError
from secura_serve.serve.app.adapters import updates as updating
from secura_serve.serve.app.adapters import watch as watching
from secura_serve.serve.app.adapters.content.snapshots import digest_of
from secura_serve.serve.app.adapters.watch import FolderWatch
from secura_serve.serve.app.answers import Answers
from secura_serve.serve.app.folding import Folding
from tests.support.engines import random_adapter
from tests.support.lifecycle import files_of, house, pushed


@pytest.fixture(scope="module")
def base(tiny_base):
    return tiny_base("llama")


@pytest.fixture
def make(base, tmp_path):
    """``make(keep=)``: a server with the adapters x and y; called again, the server restarted."""

    def start(keep=3):
        parts = house(tmp_path, base, keep=keep)
        for seed, name in enumerate("xy"):
            if not (parts.folder / name).exists():
                random_adapter(base, parts.folder / name, r=4, seed=seed, only=("q_proj",))
        parts.fill()
        return parts

    return start


async def push(parts, *changes):
    source = A.load(parts.folder / "x")
    return [await parts.updates.push("x", pushed(source, change)) for change in changes]


def test_as_many_pushes_as_are_kept_survive_a_restart(make):
    parts = make(keep=3)
    newest = [v.digest for v in asyncio.run(push(parts, 2, 3, 4, 5))][::-1]
    again = make(keep=3)
    assert [v.digest for v in again.library.records["x"].versions] == newest[:3]
    assert again.library.find("x").digest == newest[0]
    asyncio.run(again.updates.rollback("x", newest[1]))
    assert make(keep=3).library.find("x").digest == newest[1]


def test_content_that_came_back_and_went_again_stays_while_a_request_may_need_it(make):
    parts = make(keep=1)
    endings: list[asyncio.Future[None]] = []

    async def ended():
        endings.append(asyncio.get_running_loop().create_future())
        await endings[-1]

    async def run():
        await push(parts, 2)
        parts.updates.retirement.ended = ended
        (first,) = await push(parts, 3)
        await push(parts, 4)
        (second,) = await push(parts, 3)
        # The engine must not have one content under two numbers.
        assert second.snapshot.path == first.snapshot.path and second.number == first.number
        await push(parts, 5)
        await asyncio.sleep(0.05)
        # Those that ran when the content went for the first time have ended; a request that was
        # let in on its second life still waits for a slot.
        for ending in endings[:-2]:
            ending.set_result(None)
        await asyncio.sleep(0.2)
        assert second.snapshot.path.is_dir() and str(second.snapshot.path) in parts.engine.kept
        for ending in endings[-2:]:
            ending.set_result(None)
        await asyncio.sleep(0.2)
        assert not second.snapshot.path.exists()
        assert str(second.snapshot.path) not in parts.engine.kept
        assert not parts.updates.retirement.copies

    asyncio.run(run())


def test_an_upload_and_an_alias_of_one_name_do_not_both_succeed(make):
    parts = make()
    files = files_of(parts.folder / "x")

    async def run():
        upload = asyncio.ensure_future(parts.updates.upload("new", files))
        await asyncio.sleep(0)
        with pytest.raises(ConfigError, match="name already"):
            await parts.updates.set_alias("new", "y")
        await upload
        await parts.updates.set_alias("other", "y")
        with pytest.raises(ConfigError, match="is an alias of y"):
            await parts.updates.upload("other", files)

    asyncio.run(run())
    assert parts.library.aliases == {"other": "y"} and not (parts.folder / "other").exists()


def test_what_is_about_to_be_folded_cannot_be_deleted_and_what_goes_not_folded(make, monkeypatch):
    parts = make()
    folding = Folding(parts.base, Answers(["base"], parts.library))
    parts.updates.folded = folding.held
    looking, look_on = asyncio.Event(), asyncio.Event()

    async def drift(version):
        looking.set()
        await look_on.wait()
        raise ConfigError("enough")

    monkeypatch.setattr(folding, "_drift", drift)

    async def run():
        fold = asyncio.ensure_future(folding.change("x"))
        await looking.wait()
        with pytest.raises(LifecycleError, match="folded"):
            await parts.updates.delete("x")
        look_on.set()
        with pytest.raises(ConfigError, match="enough"):
            await fold

        remove = updating.remove_folder
        begun, go_on = asyncio.Event(), asyncio.Event()
        loop = asyncio.get_running_loop()

        def slowly(folder: Path) -> None:
            loop.call_soon_threadsafe(begun.set)
            asyncio.run_coroutine_threadsafe(go_on.wait(), loop).result()
            remove(folder)

        monkeypatch.setattr(updating, "remove_folder", slowly)
        gone = asyncio.ensure_future(parts.updates.delete("x"))
        await begun.wait()
        with pytest.raises(ConfigError, match="being deleted"):
            await folding.change("x")
        go_on.set()
        await gone

    asyncio.run(run())
    assert "x" not in parts.library.records and not parts.library.deleting


@pytest.mark.long
def test_a_folder_that_goes_while_it_is_folded_is_served_no_longer_once_it_is_not(
    make, monkeypatch
):
    monkeypatch.setattr(watching, "SETTLE_S", 0.2)
    parts = make()
    held = [("x", parts.library.find("x"))]
    parts.updates.folded = lambda: held

    async def run():
        task = asyncio.ensure_future(parts.watch.run())
        await asyncio.sleep(0.3)
        shutil.rmtree(parts.folder / "x")
        await asyncio.sleep(1.5)
        assert parts.library.find("x") is not None
        held.clear()
        await asyncio.sleep(1.5)
        task.cancel()

    asyncio.run(run())
    assert parts.library.find("x") is None
    assert sum("folded" in line for line in parts.said) == 1


def test_a_folder_that_is_named_by_a_relative_path_is_followed(make, monkeypatch):
    parts = make()
    monkeypatch.chdir(parts.root)
    watch = FolderWatch(Path("adapters"), parts.updates, parts.said.append)

    async def run():
        task = asyncio.ensure_future(watch.run())
        await asyncio.sleep(0.3)
        shutil.copytree(parts.folder / "x", parts.folder / ".draft")
        (parts.folder / ".draft").rename(parts.folder / "z")
        for _ in range(200):
            if parts.library.find("z") is not None:
                break
            await asyncio.sleep(0.02)
        task.cancel()

    asyncio.run(run())
    assert parts.library.find("z").digest == digest_of(parts.folder / "z")


def test_weights_from_before_1970_keep_their_versions_and_pin(make):
    parts = make()
    for file in (parts.folder / "x").iterdir():
        os.utime(file, (-400 * 86400, -400 * 86400))
    parts = make()
    newest = asyncio.run(push(parts, 2))[0].digest
    asyncio.run(parts.updates.pin("x", True))
    again = make()
    record = again.library.records["x"]
    assert record.pinned and len(record.versions) == 2 and record.versions[0].digest == newest
    assert not again.said
