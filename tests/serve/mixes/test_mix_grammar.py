"""Proves how a mix is written and what it means: the grammar, its limits, the canonical form; and
what the server forgets and when.

Needs no engine and no files: versions are names and digests, workers record what they are told. The
oracle of canonical forms is exact arithmetic on fractions.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import random
from collections import defaultdict
from fractions import Fraction

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from secura_serve.errors import MixError
from secura_serve.merge import MAX_WEIGHT
from secura_serve.serve.app.adapters.content.plain_lora import PlainLoRA
from secura_serve.serve.app.adapters.content.snapshots import Snapshot
from secura_serve.serve.app.adapters.content.verifier import Entry
from secura_serve.serve.app.adapters.library import Library, Version
from secura_serve.serve.app.adapters.mixes import grammar
from secura_serve.serve.app.adapters.mixes.canonical_mix import canonical_mix_of
from secura_serve.serve.app.adapters.mixes.grammar import (
    MAX_PARTS,
    Part,
    is_expression,
    parse,
    parts_of_field,
    spell,
)
from secura_serve.serve.app.adapters.mixes.mixes import Mixes, asked_mix
from secura_serve.serve.app.http.adapters_field import take_adapters
from secura_serve.serve.mix_path import is_mix_path, split_mix_path

NAMES = ("a", "b-2", "c.d_e", "0.5", "7")


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return filled(tmp_path_factory.mktemp("store"))


def version(root, name, number, digest):
    snapshot = Snapshot(root / digest / name, root / name, digest, ())
    return Version(
        Entry(name, None, lora=PlainLoRA(snapshot.path, 4, {}), snapshot=snapshot),
        number,
        "push",
        0,
    )


def filled(root):
    library = Library(["base", "c4+"])
    for number, name in enumerate(NAMES, 1):
        library.add(version(root, name, number, f"{number:02d}ab" * 8))
    library.add(version(root, "a", 99, "99ff" * 8))
    library.set_alias("prod", "b-2")
    return library


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a+b", [("a", 1), ("b", 1)]),
        (" a * 0.5 +  b ", [("a", 0.5), ("b", 1)]),
        ("a*-.5+a-b", [("a", -0.5), ("a-b", 1)]),
        ("0.5*2", [("0.5", 2)]),
        ("a@01ab01*1e-3", [("a@01ab01", 0.001)]),
        ("a*1000+b*-1000", [("a", 1000), ("b", -1000)]),
        ("a*-0", [("a", 0)]),
        ("a*1e-400", [("a", 0)]),
        ("a*5.", [("a", 5)]),
    ],
)
def test_what_is_well_formed(text, parts):
    assert parse(text) == tuple(Part(model, float(weight)) for model, weight in parts)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("0.5*a", "write a\\*0.5"),
        ("a+", "empty part"),
        ("+a", "empty part"),
        ("a++b", "empty part"),
        ("a*", "no weight"),
        ("a*+2", "no weight"),
        ("a*1e+3", "write 1e2"),
        ("a*nan", "no weight"),
        ("a*inf", "no weight"),
        ("a*0x1", "no weight"),
        ("a*1_0", "no weight"),
        ("a*1,5", "no weight"),
        ("a*٣", "no weight"),
        ("a*2*3", "no weight"),
        ("a**2", "no weight"),
        ("a*" + "1" * 41, "no weight"),
        ("a*1000.1", "between -1000 and 1000"),
        ("a*1e9", "between -1000 and 1000"),
        ("a - b*2", "no model's name"),
        ("a\n*2", "no model's name"),
        ("../x*2", "no model's name"),
        ("a@*2", "no model's name"),
        ("a\x00*2", "no model's name"),
        ("é*2", "no model's name"),
        ("*2", "no model's name"),
        ("+".join("a" * (MAX_PARTS + 1)), "up to 8 parts, not 9"),
        ("a+" + " " * 2000 + "b", "up to 1500 characters"),
    ],
)
def test_what_is_not_is_refused_with_the_reason(text, said):
    with pytest.raises(MixError, match=said) as refused:
        parse(text)
    assert refused.value.status == 400 and len(str(refused.value)) < 400


def test_the_longest_mix_fits():
    part = "a" * 64 + "@" + "f" * 64 + "*-" + "1." + "0" * 37
    assert len(parse("+".join([part] * MAX_PARTS))) == MAX_PARTS


@settings(max_examples=500)
@given(st.text(max_size=60) | st.text(st.sampled_from("ab01+*@.-e \n"), max_size=30))
@example("a*0.5+b")
def test_any_text_is_parsed_or_refused(text):
    try:
        parts = parse(text)
    except MixError as error:
        assert error.status == 400
        return
    # What is parsed is written back as what it is.
    assert 1 <= len(parts) <= MAX_PARTS
    assert parse(spell((p.model, p.weight) for p in parts)) == parts
    assert all(math.isfinite(p.weight) and abs(p.weight) <= MAX_WEIGHT for p in parts)


@settings(max_examples=500)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
        lambda deeper: (
            st.lists(deeper, max_size=9)
            | st.dictionaries(st.sampled_from(["name", "weight", "x"]), deeper, max_size=3)
        ),
        max_leaves=12,
    )
)
def test_any_field_is_parsed_or_refused(value):
    try:
        parts = parts_of_field(value)
    except MixError as error:
        assert error.status == 400 and len(str(error)) < 400
        return
    assert len(parts) <= MAX_PARTS
    for part in parts:
        assert abs(part.weight) <= MAX_WEIGHT and not is_expression(part.model)


def test_a_field_becomes_the_model_and_only_beside_the_base():
    body = {"model": "base", "adapters": [{"name": "a", "weight": -0.5}, {"name": "b"}], "n": 1}
    take_adapters(body, ["base", "other"])
    assert body == {"model": "a*-0.5+b", "n": 1}
    for model in ({}, {"model": None}, {"model": ""}, {"model": "other"}):
        body = {**model, "adapters": [{"name": "a"}]}
        take_adapters(body, ["base", "other"])
        assert body["model"] == "a"
    for empty in ([], None):
        body = {"model": "base", "adapters": empty}
        take_adapters(body, ["base"])
        assert body == {"model": "base"}
    body = {"model": "a", "adapters": None}
    take_adapters(body, ["base"])
    assert body == {"model": "a"}
    for given_ in ([], [{"name": "b"}]):
        with pytest.raises(MixError, match="name the base \\(base\\) or no model"):
            take_adapters({"model": "a", "adapters": given_}, ["base"])
    body = {"adapters": [{"name": "base"}]}
    take_adapters(body, ["base"])
    assert is_expression(body["model"]), "the base as a part is refused as in a mix"
    for wrong in ("a", {"name": "a"}, [{"name": "a", "weight": True}], [{"name": "a*2"}], [{}], 5):
        with pytest.raises(MixError):
            take_adapters({"adapters": wrong}, ["base"])


WEIGHTS = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.1, 0.2, 0.3, 0.5, 1e-5]),
    st.floats(-MAX_WEIGHT / MAX_PARTS, MAX_WEIGHT / MAX_PARTS, allow_nan=False),
)


@settings(max_examples=300)
@given(st.lists(st.tuples(st.sampled_from([*NAMES, "prod"]), WEIGHTS), min_size=1, max_size=8))
@example([("a", 0.1), ("a", 0.2), ("a", 0.3)])
@example([("a", 1.0), ("prod", 0.5), ("b-2", -0.5)])
def test_order_blanks_and_spelling_do_not_make_a_new_mix(library, parts):
    shuffled = list(parts)
    random.Random(0).shuffle(shuffled)
    texts = [
        spell(parts),
        " + ".join(f"{model} * {weight:.17e}".replace("e+", "e") for model, weight in shuffled),
        "+".join(f"{model}*{repr(weight).upper()}" for model, weight in reversed(parts)),
    ]
    means = [canonical_mix_of(text, library) for text in texts]
    assert len({m.path for m in means}) == len({m.engine_name for m in means}) == 1
    sums: dict[str, Fraction] = defaultdict(Fraction)
    for model, weight in parts:
        sums[library.find(model).name] += Fraction(weight)
    assert {v.name: w for v, w in means[0].parts} == {
        name: float(weight) for name, weight in sums.items() if float(weight)
    }
    assert not means[0].parts or canonical_mix_of(means[0].shown, library).path == means[0].path
    assert split_mix_path(means[0].path) == [(str(v.snapshot.path), w) for v, w in means[0].parts]


def test_what_a_mix_comes_down_to(library):
    for text in ("a*0", "a+b-2-", "a*2+a*-2", "a*0+prod*0"):
        if text != "a+b-2-":
            assert canonical_mix_of(text, library).nothing
    assert canonical_mix_of("a*1", library).alone is library.find("a")
    assert canonical_mix_of("a*0.5 + a*0.5 + 7*0", library).alone is library.find("a")
    assert canonical_mix_of("a*0.5", library).alone is None
    with pytest.raises(MixError, match="no adapter 'zz'") as refused:
        canonical_mix_of("a+zz", library)
    assert refused.value.status == 404
    with pytest.raises(MixError, match="the weights of a add up"):
        canonical_mix_of("a*600+a*600", library)


def test_versions_are_told_apart_and_shown_where_they_must_be(library):
    new, old = canonical_mix_of("a+7*2", library), canonical_mix_of("a@01ab01+7*2", library)
    assert new.path != old.path and new.engine_name != old.engine_name
    assert new.shown == old.shown == "7*2+a"
    assert canonical_mix_of("a+a@01ab01", library).shown == "a@01ab01ab01ab+a@99ff99ff99ff"
    assert is_mix_path(new.path) and not is_mix_path(str(library.find("a").snapshot.path))
    assert new.engine_name.rpartition("@")[0] == new.shown


class TestMixes:
    """A library of five adapters, at most two mixes, and workers that record what they are told."""

    @pytest.fixture(autouse=True)
    def _house(self, tmp_path):
        self.library, self.calls, self.refuse = filled(tmp_path), [], {}
        self.prepared, self.running = set(), []
        numbers = itertools.count(1000)
        self.mixes = Mixes(self.library, lambda: self, lambda: next(numbers), self.ended, limit=2)

    async def ended(self):
        if self.running:
            await asyncio.wait(set(self.running))

    def preparation(self, version):
        if version.number in self.prepared:
            return None

        async def read():
            self.calls.append(("read", version.name))
            self.prepared.add(version.number)
            return self.refuse.get(version.name)

        return read()

    async def register_mix(self, name, path):
        parts = "+".join(part.rpartition("/")[2] for part, _ in split_mix_path(path))
        self.calls.append(("tell", parts))
        await asyncio.sleep(0)
        return self.refuse.get(parts)

    async def release(self, numbers, paths):
        self.calls.append(("release", tuple(numbers)))

    async def ask(self, text):
        """Prepare as admission does; return the number that the request gets."""
        while (work := self.mixes.preparation(text)) is not None:
            if (why := await work) is not None:
                return why
        with self.mixes.asked(text):
            [found] = asked_mix(text)
            assert asked_mix("other") is None
        assert asked_mix(text) is None
        return found.number

    def test_parts_are_read_first_and_a_mix_is_told_once(self):
        async def run():
            assert await self.ask("a+7*2") == await self.ask("7*2 + a") == 1000
            assert self.calls == [("read", "7"), ("read", "a"), ("tell", "7+a")]
            assert await self.ask("7+a") == 1001
            assert self.calls[3:] == [("tell", "7+a")]
            # What comes down to an adapter is told to nobody.
            assert await self.ask("a*1") == 99 and len(self.calls) == 4
            both = await asyncio.gather(self.ask("0.5+a"), self.ask("a+0.5"))
            assert both[0] == both[1] and self.calls.count(("tell", "0.5+a")) == 1

        asyncio.run(run())

    def test_the_least_recently_asked_is_forgotten_once_nobody_runs_on_it(self):
        async def run():
            loop = asyncio.get_running_loop()
            one, two = await self.ask("a+7"), await self.ask("a+b-2")
            assert await self.ask("a+7") == one
            self.running = [loop.create_future()]
            assert len({one, two, await self.ask("7+b-2")}) == 3 and len(self.mixes) == 2
            await asyncio.sleep(0.01)
            assert not [call for call in self.calls if call[0] == "release"]
            self.running[0].set_result(None)
            await asyncio.sleep(0.01)
            assert self.calls[-1] == ("release", (two,))
            # Asked again it is a new mix to the engine.
            assert await self.ask("a+b-2") not in (one, two)

        asyncio.run(run())

    def test_one_that_comes_back_before_it_is_gone_keeps_its_number(self):
        async def run():
            loop = asyncio.get_running_loop()
            first = await self.ask("a+7")
            self.running = [loop.create_future()]
            await self.ask("a+b-2")
            await self.ask("7+b-2")
            await asyncio.sleep(0)
            assert await self.ask("a+7") == first
            # A request that was admitted since runs on it when it leaves a second time.
            earlier, self.running = self.running, [loop.create_future()]
            await self.ask("a+b-2")
            await self.ask("7+b-2")
            earlier[0].set_result(None)
            await asyncio.sleep(0.01)
            assert not any(first in call[1] for call in self.calls if call[0] == "release")
            self.running[0].set_result(None)
            await asyncio.sleep(0.01)
            assert any(first in call[1] for call in self.calls if call[0] == "release")

        asyncio.run(run())

    def test_mixes_go_with_their_parts_and_a_new_version_makes_another(self, tmp_path):
        async def run():
            old, other = await self.ask("a+7"), await self.ask("b-2+7")
            self.library.add(version(tmp_path, "a", 500, "77ee" * 8))
            assert await self.ask("a+7") not in (old, other)
            gone = self.library.remove("a")
            self.mixes.drop(gone)
            await asyncio.sleep(0.01)
            released = {number for call in self.calls if call[0] == "release" for number in call[1]}
            assert old in released and len(self.mixes) <= 1
            with pytest.raises(MixError):
                self.mixes.preparation("a+7")

        asyncio.run(run())

    def test_what_a_worker_refuses_is_told_to_whoever_asks_and_not_run(self):
        async def run():
            self.refuse["7+a"] = "too large"
            assert await self.ask("a+7") == await self.ask("a+7") == "too large"
            assert self.calls.count(("tell", "7+a")) == 1
            self.refuse["b-2"] = "damaged"
            assert "damaged" in await self.ask("a+b-2")

        asyncio.run(run())

    def test_a_request_keeps_what_it_was_admitted_for(self, tmp_path):
        async def run():
            text = "a+7"
            number = await self.ask(text)
            with self.mixes.asked(text):
                self.library.add(version(tmp_path, "a", 500, "77ee" * 8))
                assert asked_mix(text)[0].number == number
                task = asyncio.create_task(asyncio.sleep(0, asked_mix(text)))
            assert await task
            with self.mixes.asked("a*0"):
                assert asked_mix("a*0") == (None,)
            with self.mixes.asked("c4+"), self.mixes.asked(None):
                assert asked_mix("c4+") is None

        asyncio.run(run())

    def test_the_number_that_waits_to_be_forgotten_is_bounded(self, monkeypatch):
        monkeypatch.setattr("secura_serve.serve.app.adapters.mixes.mixes.LEAVING", 3)

        async def run():
            self.running = [asyncio.get_running_loop().create_future()]
            for i in range(5):
                await self.ask(f"a*{i + 2}")
            with pytest.raises(MixError, match="too many") as refused:
                await self.ask("a*100")
            assert refused.value.status == 503
            self.running[0].set_result(None)
            await asyncio.sleep(0.01)
            await self.ask("a*100")

        asyncio.run(run())


def test_paths_are_json_that_holds_every_bit(library):
    path = canonical_mix_of("a*0.1+7*1e-300", library).path
    assert json.loads(path.removeprefix("mix:"))[0][1] == 1e-300
    assert {w for _, w in split_mix_path(path)} == {0.1, 1e-300}
    assert grammar.LONGEST > 0
