"""Proves that the limit of a container counts as memory that is not there."""

from __future__ import annotations

import os

import psutil
import pytest

from secura_serve.system.host_memory import available_memory

MIB = 2**20


def write_group(folder, limit, used, *, version=2, inactive=0):
    folder.mkdir(parents=True, exist_ok=True)
    names = {1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
             2: ("memory.max", "memory.current", "inactive_file")}[version]  # fmt: skip
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 1\n{names[2]} {inactive}\nactive_file 7\n")


@pytest.fixture
def root(tmp_path):
    (tmp_path / "proc/self").mkdir(parents=True)

    def belongs_to(*lines):
        (tmp_path / "proc/self/cgroup").write_text("".join(f"{line}\n" for line in lines))
        return tmp_path

    return belongs_to


def free():
    return pytest.approx(psutil.virtual_memory().available, rel=0.3)


def test_without_groups_it_is_what_the_machine_has_free(tmp_path):
    assert available_memory(tmp_path) == free()
    assert 0 < available_memory() <= psutil.virtual_memory().total


def test_the_limit_of_a_container_counts_and_untouched_page_cache_is_free(root):
    where = root("0::/")
    write_group(where / "sys/fs/cgroup", 64 * MIB, 40 * MIB, inactive=10 * MIB)
    assert available_memory(where) == 34 * MIB


def test_a_group_above_may_be_the_tighter_one(root):
    where = root("0::/pods.slice/pod.scope")
    above = where / "sys/fs/cgroup/pods.slice"
    write_group(above, 50 * MIB, 45 * MIB)
    write_group(above / "pod.scope", 40 * MIB, 10 * MIB)
    assert available_memory(where) == 5 * MIB


def test_a_group_above_its_limit_leaves_nothing(root):
    where = root("0::/")
    write_group(where / "sys/fs/cgroup", 8 * MIB, 9 * MIB)
    assert available_memory(where) == 0


def test_no_limit_is_none(root):
    where = root("0::/a")
    write_group(where / "sys/fs/cgroup/a", "max", 5 * MIB)
    assert available_memory(where) == free()


def test_the_older_groups_count_as_well(root):
    where = root("5:devices:/box", "4:cpu,memory:/box", "0::/")
    write_group(where / "sys/fs/cgroup/memory/box", 32 * MIB, 12 * MIB, version=1, inactive=2 * MIB)
    write_group(where / "sys/fs/cgroup/memory", 2**63 - 4096, 900 * MIB, version=1)
    assert available_memory(where) == 22 * MIB


def test_a_path_of_the_host_means_the_mount(root):
    where = root("4:memory:/docker/0123", "0::/")
    write_group(where / "sys/fs/cgroup/memory", 16 * MIB, MIB, version=1)
    assert available_memory(where) == 15 * MIB


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"\n\n", b"nonsense\n", b"0:\n", b"0::\n", b"0::/../../other\n", b"0::/a\0b\n"),
        *(b"0::/caf\xe9\n", "0::/a\x85b\u2028c\n".encode(), b"0::/" + b"deep/" * 5000 + b"\n"),
    ],
)
def test_whatever_the_system_says_of_groups_is_no_error(root, content):
    where = root()
    (where / "proc/self/cgroup").write_bytes(content)
    assert available_memory(where) == free()


@pytest.mark.parametrize("name", [b"caf\xe9", "a\x85b\u2028c".encode(), b"a:b:c"])
def test_a_group_may_have_any_name(root, name):
    where = root()
    (where / "proc/self/cgroup").write_bytes(b"0::/" + name + b"\n")
    write_group(where / "sys/fs/cgroup" / os.fsdecode(name), 64 * MIB, 40 * MIB)
    assert available_memory(where) == 24 * MIB


@pytest.mark.parametrize("stat", ["", "inactive_file\n", "inactive_file x\n", "a b c\n", "\xe9"])
def test_a_group_whose_files_make_no_sense_counts_for_nothing(root, stat):
    where = root("0::/a")
    write_group(where / "sys/fs/cgroup/a", "9" * 5000, "-3")
    (where / "sys/fs/cgroup/a/memory.stat").write_text(stat, encoding="latin-1")
    assert available_memory(where) == free()
