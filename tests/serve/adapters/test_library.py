"""Proves what a model name stands for: versions, rollbacks, aliases, and which names are allowed.

Needs no engine and no files: a version here is a name and a digest.
"""

from __future__ import annotations

import pytest

from secura_serve.errors import ConfigError, LifecycleError
from secura_serve.serve.app.adapters.content.plain_lora import PlainLoRA
from secura_serve.serve.app.adapters.content.snapshots import Snapshot
from secura_serve.serve.app.adapters.content.verifier import Entry
from secura_serve.serve.app.adapters.library import Library, Version, split_version
from secura_serve.serve.app.adapters.table import AdapterTable

DIGESTS = [f"{letter}{number}" * 16 for number, letter in enumerate("abcdef")]


@pytest.fixture
def version(tmp_path):
    numbers = iter(range(1, 1000))

    def make(digest, name="x", origin="folder"):
        path = tmp_path / digest / name
        snapshot = Snapshot(path, tmp_path / name, digest, ())
        entry = Entry(name, None, lora=PlainLoRA(path, 4, {}), snapshot=snapshot)
        return Version(entry, next(numbers), origin, 0.0)

    return make


def digests(library, name="x"):
    return [v.digest for v in library.records[name].versions]


def test_the_name_stands_for_the_newest_and_a_digest_for_one_exactly(version):
    library = Library(["base"], keep=3)
    for digest in DIGESTS[:3]:
        assert library.add(version(digest)) == []
        assert library.find("x").digest == digest
    for digest in DIGESTS[:3]:
        for asked in (digest, digest[:6], digest.upper(), digest[:9].upper()):
            assert library.find(f"x@{asked}").digest == digest
    for asked in (
        "x@",
        "x@a0a0a",
        "x@zzzzzz",
        f"x@{DIGESTS[0]}0",
        "x@a0a0a0@",
        "y",
        "",
        "@",
        "x@@",
    ):
        assert library.find(asked) is None, asked
    assert split_version("x@a@b") == ("x", "a@b") and split_version("x") == ("x", None)


def test_a_prefix_of_two_versions_names_neither(version):
    library = Library(["base"])
    for digest in ("abcdef" + "0" * 26, "abcdef" + "1" * 26):
        library.add(version(digest))
    assert library.find("x@abcdef") is None
    assert library.find("x@abcdef0").digest.endswith("0")


def test_the_last_n_stay_with_those_that_something_stands_for(version):
    library = Library(["base"], keep=2)
    first = version(DIGESTS[0])
    library.add(first)
    library.set_alias("stable", f"x@{DIGESTS[0][:8]}")
    library.set_alias("latest", "x")
    second = version(DIGESTS[1])
    library.add(second)
    assert library.add(version(DIGESTS[2])) == []
    # An alias holds the first; of the others the newest two stay.
    assert library.add(version(DIGESTS[3])) == [second]
    assert digests(library) == [DIGESTS[3], DIGESTS[2], DIGESTS[0]]
    assert library.find("stable") is first and library.find("latest").digest == DIGESTS[3]
    library.remove_alias("stable")
    assert library.add(version(DIGESTS[4]))[-1] is first
    assert library.find(f"x@{DIGESTS[0]}") is None


def test_the_same_content_again_keeps_its_number_and_becomes_the_newest(version):
    library = Library(["base"], keep=3)
    first = version(DIGESTS[0])
    library.add(first)
    library.add(version(DIGESTS[1]))
    assert library.add(version(DIGESTS[0])) == []
    assert library.find("x") is first and digests(library) == [DIGESTS[0], DIGESTS[1]]


def test_a_rollback_lasts_until_the_next_new_content(version):
    library = Library(["base"], keep=3)
    with pytest.raises(LifecycleError) as refused:
        library.rollback("x")
    assert refused.value.status == 404
    for digest in DIGESTS[:3]:
        library.add(version(digest))
    assert library.rollback("x").digest == DIGESTS[1]
    assert library.find("x").digest == DIGESTS[1]
    assert library.rollback("x").digest == DIGESTS[0]
    with pytest.raises(LifecycleError, match="no version older") as refused:
        library.rollback("x")
    assert refused.value.status == 409 and library.find("x").digest == DIGESTS[0]
    assert library.rollback("x", DIGESTS[2][:6]).digest == DIGESTS[2]
    assert library.records["x"].rolled_back_to is None
    library.rollback("x", DIGESTS[0])
    for digest in ("", "a0", DIGESTS[5], "\x00", "@", f"@{DIGESTS[0]}"):
        with pytest.raises(LifecycleError) as refused:
            library.rollback("x", digest)
        assert refused.value.status == 404 and library.find("x").digest == DIGESTS[0]
    library.add(version(DIGESTS[3]))
    assert library.find("x").digest == DIGESTS[3]


def test_what_was_rolled_back_to_stays_and_serves_however_old_it_is(version):
    library = Library(["base"], keep=1)
    first = version(DIGESTS[0])
    library.add(first)
    assert library.add(version(DIGESTS[1])) == [first]


@pytest.mark.parametrize(
    "name", ["a@b", "a*2", "a+b", "@", "", ".", "-a", "a b", "a\n", "a\x00", "é", "a/b", "a" * 65]
)
def test_reserved_names_are_refused_with_the_hint(version, name):
    library = Library(["base"])
    library.add(version(DIGESTS[0]))
    for refused in (library.check_free, lambda n: library.set_alias(n, "x")):
        with pytest.raises(ConfigError, match="'@', '\\*' and '\\+' have a meaning"):
            refused(name)
    assert not library.aliases


def test_the_base_s_name_and_aliases_are_taken(version):
    library = Library(["base", "other"])
    library.add(version(DIGESTS[0]))
    for base in ("base", "other"):
        with pytest.raises(ConfigError, match="is the base model's name"):
            library.check_free(base)
        with pytest.raises(ConfigError, match="choose another alias"):
            library.set_alias(base, "x")
    with pytest.raises(ConfigError, match="choose another alias"):
        library.set_alias("x", "x")
    library.set_alias("a", "x")
    with pytest.raises(ConfigError, match="is an alias of x"):
        library.check_free("a")
    for target in ("a", "nothing", "x@123456", "base", ""):
        with pytest.raises(LifecycleError) as refused:
            library.set_alias("b", target)
        assert refused.value.status == 404
    library.set_alias("b", "x")
    assert library.aliases_of("x") == {"a": "x", "b": "x"}
    library.remove("x")
    assert not library.aliases and library.find("a") is None
    with pytest.raises(LifecycleError):
        library.remove_alias("a")


def test_a_refused_update_leaves_the_old_version_serving(version):
    changed = []
    library = Library(["base"], changed=changed.append)
    library.add(version(DIGESTS[0]))
    library.refuse("x", "it is damaged")
    assert library.find("x").digest == DIGESTS[0] and library.records["x"].refused
    library.add(version(DIGESTS[1]))
    assert library.records["x"].refused is None
    library.refuse("never", "it is damaged")
    assert library.find("never") is None and [v.name for v in library] == ["x"]
    assert changed == ["x", "x", "x", "never"]


def test_vllm_s_table_finds_versions_and_aliases_and_lists_names_alone(version):
    pytest.importorskip("vllm")
    library = Library(["base"], keep=2)
    table = AdapterTable(library)
    library.changed = table.update_name
    first, second = version(DIGESTS[0]), version(DIGESTS[1])
    library.add(first)
    request = table["x"]
    library.add(second)
    library.set_alias("a", f"x@{DIGESTS[0]}")
    assert list(table) == ["x"] and table["x"].lora_int_id == second.number
    assert table["a"] is table[f"x@{DIGESTS[0][:6]}"] is request
    assert request.lora_int_id == first.number and request.lora_path == str(first.snapshot.path)
    for name in ("x", "a", f"x@{DIGESTS[1]}"):
        assert name in table
    for name in ("base", "y", "x@", None, 3, ["x"]):
        if name is None or isinstance(name, (str, int)):
            assert name not in table
    with pytest.raises(KeyError):
        table["y"]
    for digest in DIGESTS[2:]:
        library.add(version(digest))
    library.remove("x")
    assert not table and "a" not in table and "x" not in table
