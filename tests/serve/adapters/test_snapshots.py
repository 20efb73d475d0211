"""Proves that what is served is what was verified: copies are named by content, whole or absent.

Needs no vLLM. A full disk is simulated by a write that fails.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch

from secura_serve.errors import AdapterFormatError, StorageError
from secura_serve.serve.app.adapters.content import snapshots
from secura_serve.serve.app.adapters.content.snapshots import SnapshotStore
from secura_serve.serve.engine.mmap_tensors import map_tensors

FILES = ("adapter_config.json", "adapter_model.safetensors")


def write(folder: Path, config: bytes = b"{}", weights: bytes = b"w" * 1000) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in zip(FILES, (config, weights), strict=True):
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture
def store(tmp_path):
    return SnapshotStore(tmp_path / "cache")


def test_the_same_content_is_one_copy_and_other_content_another_path(store, tmp_path):
    source = write(tmp_path / "a")
    first = store.take(source)
    inode = (first.path / FILES[1]).stat().st_ino
    assert first.path.name == "a" and first.digest in str(first.path)
    assert store.take(source) == first and (first.path / FILES[1]).stat().st_ino == inode
    assert not first.has_changed()
    # A byte that moves from one file to the other is another content.
    for config, weights in ((b"{}", b"v" * 1000), (b"{}w", b"w" * 999)):
        other = store.take(write(source, config, weights))
        assert other.path != first.path and first.has_changed()
        assert (other.path / FILES[1]).read_bytes() == weights
    assert (first.path / FILES[1]).read_bytes() == b"w" * 1000
    # The same content under another name is a model of its own.
    assert store.take(write(tmp_path / "b")).path == first.path.with_name("b")


def test_the_source_may_vanish_and_a_touched_one_has_not_changed(store, tmp_path):
    source = write(tmp_path / "a")
    snapshot = store.take(source)
    write(source)
    assert not snapshot.has_changed()
    (source / FILES[0]).unlink()
    assert snapshot.has_changed() and (snapshot.path / FILES[0]).read_bytes() == b"{}"
    with pytest.raises(AdapterFormatError, match="a cannot be read"):
        store.take(source)


def test_a_damaged_copy_is_made_again(store, tmp_path):
    source = write(tmp_path / "a")
    copy = store.take(source).path / FILES[1]
    for damage in (lambda: copy.write_bytes(b"x"), copy.unlink):
        damage()
        assert store.take(source).path == copy.parent and copy.read_bytes() == b"w" * 1000
    assert [p for p in store.root.iterdir() if p.name.startswith(".")] == []


@pytest.mark.parametrize("where", ["fsync", "rename"])
def test_a_full_disk_is_one_error_and_leaves_nothing(where, store, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(*((os, "fsync") if where == "fsync" else (Path, "rename")), full)
    with pytest.raises(StorageError, match="SECURA_CACHE"):
        store.take(write(tmp_path / "a"))
    assert [p for p in store.root.rglob("*") if p.is_file()] == []


def test_copies_that_no_start_used_are_removed(store, tmp_path):
    old, new = store.take(write(tmp_path / "a")), store.take(write(tmp_path / "b", b"[]"))
    (store.root / ".draft-of-a-killed-process").mkdir()
    past = time.time() - (snapshots.KEPT_DAYS + 1) * 86400
    for entry in (old.path.parent, store.root / ".draft-of-a-killed-process"):
        os.utime(entry, (past, past))
    store.remove_unused()
    assert [p.name for p in store.root.iterdir()] == [new.digest]
    SnapshotStore(tmp_path / "never-made").remove_unused()


def test_mapped_tensors_are_equal_and_leave_no_name(tmp_path):
    tensors = [
        torch.randn(3, 5),
        torch.arange(7),
        torch.randn(4, 1).bfloat16(),
        torch.zeros(0),
        torch.randn(6, 4).T,
    ]
    mapped = map_tensors(tensors, tmp_path / "m")
    for got, want in zip(mapped, tensors, strict=True):
        assert got.dtype == want.dtype and torch.equal(got, want)
    assert list((tmp_path / "m").iterdir()) == []
    assert map_tensors([torch.zeros(0)], tmp_path)[0].numel() == 0
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="SECURA_CACHE"):
        map_tensors(tensors, tmp_path / "file")
