"""Proves who gets a place for a full-rank adapter, who waits, and what is never taken away.

Needs no engine: the slots are real, their images are made, and the worker's half is recorded.
"""

from __future__ import annotations

import asyncio
import dataclasses
import shutil
from contextlib import ExitStack
from types import SimpleNamespace

import pytest

from secura_serve.checkpoint import Checkpoint
from secura_serve.errors import LifecycleError, StorageError
from secura_serve.method import MagNorm
from secura_serve.serve.app.adapters.content.images import DeltaImages
from secura_serve.serve.app.adapters.resident import slots as module
from secura_serve.serve.app.adapters.resident.guard import guard
from secura_serve.serve.app.adapters.resident.plan import place_nbytes
from secura_serve.serve.app.adapters.resident.slots import ADMITTED, ResidentSlots, ResidentSpec
from secura_serve.serve.app.adapters.table import AdapterTable
from tests.support.engines import random_adapter
from tests.support.lifecycle import house

BOUNDED = MagNorm("bounded", tau=0.1)
NAMES = ("a", "b", "c")


@pytest.fixture(scope="module")
def base(tiny_base):
    return tiny_base("llama")


@pytest.fixture
def parts(base, tmp_path):
    """A house with two places and three adapters that want one, and one that needs none."""
    made = house(tmp_path, base)
    for seed, name in enumerate(NAMES):
        random_adapter(base, made.folder / name, r=2, seed=seed, magnorm=BOUNDED)
    random_adapter(base, made.folder / "plain", r=2, seed=9)
    spec = ResidentSpec(2, "int8", tuple(Checkpoint(base).linears()))
    made.updates.residency.places = ResidentSlots(
        spec, DeltaImages(tmp_path / "deltas", base, "int8")
    )
    made.updates.residency.places.workers = made.updates.residency.workers
    made.updates.fill(made.updates.verifier.examine(made.folder / n) for n in [*NAMES, "plain"])

    async def make_images():
        for name in NAMES:
            v = made.library.find(name)
            assert await made.updates.residency.places.make_image(v.snapshot.path, v.image) is None

    asyncio.run(make_images())
    return made


def version(parts, name):
    return parts.library.find(name)


async def ready(parts, name):
    """Wait as admission does; return why it cannot be served, or None."""
    refused = None
    while refused is None and (work := parts.updates.preparation(name)) is not None:
        refused = await work
    return refused


def images(parts):
    return sorted(parts.engine.places.values())


def test_they_are_asked_per_request_and_known_by_their_images(parts):
    for name in NAMES:
        v = version(parts, name)
        assert v.per_request and v.image is not None and v.engine_path == v.image
    assert len({version(parts, name).image for name in NAMES}) == 3
    assert version(parts, "plain").image is None
    table = AdapterTable(parts.library)
    assert set(table) == {*NAMES, "plain"}
    assert table["a"].lora_path == str(version(parts, "a").image)


def test_the_least_recently_asked_one_leaves_its_place(parts):
    async def work():
        for name in ("a", "b", "a", "c"):
            assert await ready(parts, name) is None

    asyncio.run(work())
    assert images(parts) == sorted(str(version(parts, n).image) for n in ("a", "c"))
    gone = version(parts, "b")
    assert ([gone.number], [str(gone.image)]) in parts.engine.called("secura_forget")
    assert len(parts.updates.residency.places.numbers) == 2


def test_one_that_is_in_use_keeps_its_place_and_the_next_one_waits(parts, monkeypatch):
    async def work():
        monkeypatch.setattr(module, "_WAIT_S", 0.2)
        with ExitStack() as running:
            for name in ("a", "b"):
                assert await ready(parts, name) is None
                running.enter_context(parts.updates.admit(name))
            with pytest.raises(LifecycleError, match=r"was ready for 0.2 s") as late:
                await ready(parts, "c")
            assert late.value.status == 503
            assert images(parts) == sorted(str(version(parts, n).image) for n in ("a", "b"))
            monkeypatch.setattr(module, "_WAIT_S", 30)
            waiting = asyncio.ensure_future(ready(parts, "c"))
            await asyncio.sleep(0.05)
            assert not waiting.done()
        assert await waiting is None

    asyncio.run(work())
    assert str(version(parts, "c").image) in images(parts)


@pytest.mark.parametrize(("count", "pinned"), [(1, False), (2, False), (2, True)])
def test_what_was_waited_for_is_not_taken_before_the_waiter_has_it(count, pinned, parts):
    """More adapters than places, all asked at once: each is answered, none for ever."""
    places = parts.updates.residency.places
    parts.updates.residency.places = ResidentSlots(
        dataclasses.replace(places.spec, count=count), places.images
    )
    parts.updates.residency.places.workers = places.workers

    async def ask(name):
        assert await ready(parts, name) is None
        with parts.updates.admit(name):
            assert version(parts, name).number in parts.updates.residency.places.numbers
            await asyncio.sleep(0.005)
            assert version(parts, name).number in parts.updates.residency.places.numbers

    async def work():
        if pinned:
            await parts.updates.pin("a", True)
        await asyncio.wait_for(asyncio.gather(*(ask(NAMES[i % 3]) for i in range(30))), 20)

    asyncio.run(work())
    # Each adapter at most once for those who came first, and once for those who came meanwhile.
    assert len(parts.engine.called("secura_publish")) <= 6
    assert not parts.updates.residency.places._users


def test_those_who_keep_a_place_busy_let_the_next_one_in(parts):
    """A waiting request is not overtaken for ever by new ones for who is in the place."""
    resident = parts.updates.residency.places
    resident.spec = ResidentSpec(1, "int8", resident.spec.modules)
    resident._free = [0]
    done = []

    async def ask(name, times):
        for _ in range(times):
            assert await ready(parts, name) is None
            with parts.updates.admit(name):
                await asyncio.sleep(0.01)
            done.append(name)

    async def work():
        crowd = [asyncio.ensure_future(ask("a", 40)) for _ in range(3)]
        await asyncio.sleep(0.1)
        await asyncio.wait_for(ask("b", 3), 10)
        assert done.count("a") < 120
        await asyncio.gather(*crowd)

    asyncio.run(work())
    assert done.count("a") == 120 and done.count("b") == 3


def test_who_went_away_while_waiting_is_not_filled_in(parts):
    async def work():
        with ExitStack() as running:
            for name in ("a", "b"):
                assert await ready(parts, name) is None
                running.enter_context(parts.updates.admit(name))
            gone = asyncio.ensure_future(ready(parts, "c"))
            await asyncio.sleep(0.05)
            gone.cancel()
            await asyncio.sleep(0.05)
        await asyncio.gather(*parts.updates.residency.places._loading.values())
        assert str(version(parts, "c").image) not in images(parts)

    asyncio.run(work())


def test_requests_for_one_that_is_on_its_way_wait_for_the_same(parts):
    async def work():
        parts.engine.filling.clear()
        asks = [asyncio.ensure_future(ready(parts, "a")) for _ in range(5)]
        await asyncio.sleep(0.05)
        parts.engine.filling.set()
        assert await asyncio.gather(*asks) == [None] * 5

    asyncio.run(work())
    assert len(parts.engine.called("secura_publish")) == 1


def test_a_worker_that_refuses_leaves_the_place_free_and_is_asked_again(parts):
    async def work():
        parts.engine.refuses = "no such linear"
        assert await ready(parts, "a") == "no such linear"
        parts.engine.refuses = None
        for name in ("a", "b"):
            assert await ready(parts, name) is None

    asyncio.run(work())
    assert len(parts.engine.places) == 2


def test_a_call_that_does_not_get_through_leaves_the_place_free(parts, monkeypatch):
    def fails(place, image):
        raise LookupError("a worker's own error")

    async def work():
        with monkeypatch.context() as patched:
            patched.setattr(parts.engine, "secura_publish", fails)
            for _ in range(3):
                with pytest.raises(LookupError):
                    await ready(parts, "a")
        for name in ("a", "b"):
            assert await ready(parts, name) is None

    asyncio.run(work())
    assert len(parts.engine.places) == 2


def test_a_place_that_could_not_be_emptied_is_not_lost(parts, monkeypatch):
    def fails(numbers, paths):
        raise LookupError("a worker's own error")

    async def work():
        for name in ("a", "b"):
            assert await ready(parts, name) is None
        with monkeypatch.context() as patched:
            patched.setattr(parts.engine, "secura_forget", fails)
            with pytest.raises(LookupError):
                await ready(parts, "c")
        for name in ("a", "b", "c"):
            assert await ready(parts, name) is None
        assert len(parts.updates.residency.places.numbers) == 2

    asyncio.run(work())


def test_an_image_that_another_server_removes_meanwhile_is_made_again(parts, monkeypatch):
    async def work():
        images, fill = parts.updates.residency.places.images, parts.engine.secura_fill
        lost = []

        def removed_once(place, image, first, last):
            if not lost:
                lost.append(image)
                images.remove(version(parts, "a").image)
                return f"{image} cannot be read"
            return fill(place, image, first, last)

        monkeypatch.setattr(parts.engine, "secura_fill", removed_once)
        assert await ready(parts, "a") is None
        assert lost == [str(version(parts, "a").image)]

    asyncio.run(work())
    assert images(parts) == [str(version(parts, "a").image)]


def test_a_full_disk_is_no_fault_of_the_adapter(parts, base, monkeypatch):
    async def work():
        before = version(parts, "a")
        other = random_adapter(base, parts.root / "new" / "a", r=2, seed=7, magnorm=BOUNDED)
        shutil.rmtree(parts.folder / "a")
        other.rename(parts.folder / "a")
        monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=0))
        with pytest.raises(StorageError, match="MiB free"):
            await parts.updates.from_folder("a")
        assert version(parts, "a") is before
        assert parts.library.record("a").refused is None
        monkeypatch.undo()
        assert await parts.updates.from_folder("a") is not before

    asyncio.run(work())


def test_an_engine_that_raises_leaves_the_place_free(parts):
    async def work():
        assert await ready(parts, "b") is None
        parts.engine.raises = RuntimeError("the engine is gone")
        with pytest.raises(RuntimeError, match="gone"):
            await ready(parts, "a")
        parts.engine.raises = None
        assert await ready(parts, "a") is None

    asyncio.run(work())
    assert len(parts.engine.places) == 2


def test_what_goes_on_in_the_background_holds_everything(parts, monkeypatch):
    async def work():
        for name in ("a", "b"):
            await ready(parts, name)
        monkeypatch.setattr(module, "_WAIT_S", 0.2)
        with parts.updates.residency.places.all_held(), pytest.raises(LifecycleError):
            await ready(parts, "c")
        monkeypatch.setattr(module, "_WAIT_S", 30)
        assert await ready(parts, "c") is None

    asyncio.run(work())


def test_a_pin_keeps_the_place_and_one_stays_free(parts):
    async def work():
        await parts.updates.pin("a", True)
        for name in ("b", "c", "b"):
            assert await ready(parts, name) is None
        assert str(version(parts, "a").image) in images(parts)
        with pytest.raises(LifecycleError, match="must stay free") as full:
            await parts.updates.pin("b", True)
        assert full.value.status == 409
        await parts.updates.pin("a", False)
        for name in ("b", "c"):
            assert await ready(parts, name) is None
        assert str(version(parts, "a").image) not in images(parts)

    asyncio.run(work())


def test_a_request_gets_the_version_that_it_was_admitted_for(parts, base):
    async def work():
        table = AdapterTable(parts.library)
        parts.library.changed = table.update_name
        assert await ready(parts, "a") is None
        old = version(parts, "a")
        with parts.updates.admit("a"):
            other = random_adapter(
                base, parts.root / "other" / "a", r=2, seed=8, magnorm=MagNorm("bounded", tau=0.2)
            )
            (parts.folder / "a").rename(parts.root / "before")
            other.rename(parts.folder / "a")
            new = await parts.updates.from_folder("a")
            assert new is version(parts, "a") and new.number != old.number
            assert table["a"].lora_int_id == old.number
            assert old.number in parts.updates.residency.places.numbers
        assert ADMITTED.get() is None
        assert table["a"].lora_int_id == new.number

    asyncio.run(work())


def test_the_engine_is_never_asked_for_one_that_is_in_no_place(parts):
    async def work():
        asked = []

        async def generate(prompt, sampling_params, request_id, lora_request=None):
            asked.append(lora_request)
            yield "token"
            yield "end"

        engine = SimpleNamespace(generate=generate, encode=generate)
        guard(engine, parts.updates.residency.places)
        table = AdapterTable(parts.library)
        plain = [x async for x in engine.generate("p", None, "1", lora_request=table["plain"])]
        assert plain == ["token", "end"]
        with pytest.raises(LifecycleError, match="left its place"):
            async for _ in engine.generate("p", None, "1", lora_request=table["a"]):
                pass
        with pytest.raises(LifecycleError, match="left its place"):
            async for _ in engine.encode("p", None, "1", table["a"]):
                pass
        assert len(asked) == 1
        assert await ready(parts, "a") is None
        answers = engine.generate("p", None, "1", lora_request=table["a"])
        assert await anext(answers) == "token"
        assert parts.updates.residency.places._users == {version(parts, "a").number: 1}
        await answers.aclose()
        assert not parts.updates.residency.places._users

    asyncio.run(work())


def test_a_removed_adapter_leaves_place_and_disk(parts):
    async def work():
        assert await ready(parts, "a") is None
        gone = version(parts, "a")
        assert gone.image.is_dir()
        await parts.updates.delete("a")
        await asyncio.gather(*parts.updates.retirement.running)
        assert not gone.image.exists() and gone.number not in parts.updates.residency.places.numbers
        for name in ("b", "c"):
            assert await ready(parts, name) is None

    asyncio.run(work())


def test_folded_ones_take_no_place(parts):
    parts.updates.folded = lambda: [("a", version(parts, "a")), (None, None)]
    assert parts.updates.preparation("a") is None
    with parts.updates.admit("a"):
        assert ADMITTED.get() is None


def test_an_adapter_of_other_linears_takes_no_place(parts, base, tmp_path):
    linears = [m for m in Checkpoint(base).linears() if m.endswith("q_proj")]
    narrow = ResidentSlots(
        ResidentSpec(1, "int8", tuple(linears)), DeltaImages(tmp_path / "d", base, "int8")
    )
    assert not narrow.takes(version(parts, "a").entry)
    assert not narrow.takes(version(parts, "plain").entry)
    none = ResidentSlots(ResidentSpec(0, "int8", ()), DeltaImages(tmp_path / "d", base, "int8"))
    assert not none.takes(version(parts, "a").entry)


def test_a_place_takes_a_byte_a_number_and_a_scale_a_row(base):
    checkpoint = Checkpoint(base)
    linears = checkpoint.linears()
    shapes = [checkpoint.shape(m) for m in linears]
    assert place_nbytes(linears, "int8", checkpoint) == sum(o * i + 4 * o for o, i in shapes)
    assert place_nbytes(linears, "float32", checkpoint) == sum(4 * o * (i + 1) for o, i in shapes)


def test_two_adapters_of_one_content_have_a_place_each(parts):
    shutil.copytree(parts.folder / "a", parts.folder / "twin")
    parts.updates.fill([parts.updates.verifier.examine(parts.folder / "twin")])

    async def work():
        for name in ("a", "twin"):
            assert await ready(parts, name) is None
        assert len(set(images(parts))) == 2
        assert await ready(parts, "b") is None
        assert str(version(parts, "twin").image) in images(parts)

    asyncio.run(work())
