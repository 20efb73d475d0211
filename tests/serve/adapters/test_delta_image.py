"""Proves what a delta image holds against W' − W in float64, and what a damaged one is told.

Needs torch only: tiny random bases, adapters whose norm makes them full-rank.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil

import pytest
from safetensors.torch import load_file, save_file

from secura_serve.checkpoint import Checkpoint
from secura_serve.errors import MergeError, StorageError
from secura_serve.method import MagNorm, dequantise_rows
from secura_serve.serve.app.adapters.content import images as content
from secura_serve.serve.app.adapters.content.images import DeltaImages
from secura_serve.serve.delta_image import DeltaImage, image_nbytes
from secura_serve.system.atomic import only_writer
from tests.support import oracle
from tests.support.engines import random_adapter

NORMS = {"bounded": MagNorm("bounded", tau=0.1), "published": MagNorm("published")}


def _made(root, base, adapter, dtype):
    images = DeltaImages(root / "images", base, dtype)
    folder = images.folder("a", "0" * 32)
    return images, asyncio.run(images.make(folder, [str(adapter)]))


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
@pytest.mark.parametrize("norm", list(NORMS))
@pytest.mark.parametrize("dtype", ["int8", "float32"])
def test_holds_the_change_of_every_weight(arch, norm, dtype, tiny_base, tmp_path):
    base = tiny_base(arch)
    adapter = random_adapter(base, tmp_path / "a", r=4, seed=1, magnorm=NORMS[norm], size=4)
    _, image = _made(tmp_path, base, adapter, dtype)
    checkpoint = Checkpoint(base)
    plain, adapted = oracle.adapted(base, None), oracle.adapted(base, adapter)
    assert sorted(image.modules) == sorted(checkpoint.linears())
    shapes = [checkpoint.shape(module) for module in image.modules]
    assert 0 < image.size - image_nbytes(shapes, dtype) < 2**16
    wrong = whole = 0.0
    for module, weight, scale in image.read(image.modules):
        find = [m.get_submodule(module).weight.data.double() for m in (adapted, plain)]
        D = find[0] - find[1]
        D = D.T if checkpoint.is_conv1d(module) else D
        assert weight.shape == D.shape and scale.shape == D.shape[:1]
        got = dequantise_rows(weight, scale).double()
        wrong += float((got - D).square().sum())
        whole += float(D.square().sum())
        # Both folds round in float32; 8 bits are exact to half a step.
        step = D.abs().amax(1, keepdim=True) / 127 if dtype == "int8" else 0
        assert ((got - D).abs() <= step * 0.501 + 2**-20 * find[0].abs().max()).all(), module
    error = (wrong / whole) ** 0.5
    assert error == pytest.approx(image.error, abs=1e-4)
    assert error < (0.012 if dtype == "int8" else 1e-4)


def test_it_is_made_once_and_found_again(tiny_base, tmp_path):
    base = shutil.copytree(tiny_base("llama"), tmp_path / "base")
    adapter = random_adapter(base, tmp_path / "a", r=4, seed=1, magnorm=NORMS["bounded"])
    images, first = _made(tmp_path, base, adapter, "int8")
    before = (first.folder / "delta.safetensors").stat()
    again = asyncio.run(DeltaImages(images.root, base, "int8").make(first.folder, ["/nowhere"]))
    assert again == first
    assert (first.folder / "delta.safetensors").stat().st_ino == before.st_ino
    other = {
        images.folder("a", "1" * 32),
        DeltaImages(images.root, base, "float32").folder("a", "0" * 32),
        first.folder,
    }
    os.utime(base / "model.safetensors", ns=(1, 1))
    assert len(other | {images.folder("a", "0" * 32)}) == 4


def _truncate(folder):
    file = folder / "delta.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def _set(key, value):
    def change(folder):
        file = folder / "delta.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))

    return change


@pytest.mark.parametrize(
    "damage",
    [
        _truncate,
        _set("format", 1),
        _set("dtype", "int4"),
        lambda folder: (folder / "delta.json").write_text("[]"),
        lambda folder: (folder / "delta.json").unlink(),
        lambda folder: (folder / "delta.safetensors").unlink(),
    ],
)
def test_a_damaged_image_is_refused_and_made_again(damage, tiny_base, tmp_path):
    base = tiny_base("llama")
    adapter = random_adapter(base, tmp_path / "a", r=4, seed=1, magnorm=NORMS["bounded"])
    images, image = _made(tmp_path, base, adapter, "int8")
    damage(image.folder)
    with pytest.raises(StorageError, match="no usable delta image"):
        DeltaImage.open(image.folder)
    assert asyncio.run(images.make(image.folder, [str(adapter)])) == image
    # Bytes that changed without a change of size.
    file = image.folder / "delta.safetensors"
    content = bytearray(file.read_bytes())
    content[-9] ^= 1
    file.write_bytes(content)
    with pytest.raises(StorageError, match="its bytes have changed"):
        DeltaImages(images.root, base, "int8").found(image.folder)
    assert asyncio.run(images.make(image.folder, [str(adapter)])) == image
    image.check()
    assert [p.name for p in images.root.iterdir() if not p.name.startswith(".")] == [
        image.folder.name
    ]


def test_another_base_is_refused_and_leaves_nothing_behind(tiny_base, tmp_path):
    base = tiny_base("llama")
    adapter = random_adapter(base, tmp_path / "a", r=4, seed=1, magnorm=NORMS["published"])
    other = shutil.copytree(base, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    save_file({name: t * 1.5 for name, t in tensors.items()}, other / "model.safetensors")
    images = DeltaImages(tmp_path / "images", other, "int8")
    with pytest.raises(MergeError, match="trained on another base"):
        asyncio.run(images.make(images.folder("a", "0" * 32), [str(adapter)]))
    assert not [p for p in images.root.glob("*") if p.is_dir()]


def test_a_full_disk_is_told_before_anything_is_written(tiny_base, tmp_path, monkeypatch):
    base = tiny_base("llama")
    adapter = random_adapter(base, tmp_path / "a", r=4, seed=1, magnorm=NORMS["bounded"])
    images = DeltaImages(tmp_path / "images", base, "int8")
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(StorageError, match="MiB free, the changes of the adapter's weights need"):
        asyncio.run(images.make(images.folder("a", "0" * 32), [str(adapter)]))
    assert not any(images.root.iterdir())


def test_images_that_no_server_uses_are_removed(tmp_path):
    images = DeltaImages(tmp_path, tmp_path, "int8")
    for name in ("old", "new", ".old.x.partial", ".new.x.partial"):
        (tmp_path / name).mkdir()
    for name in (".old.lock", ".gone.lock", ".new.lock"):
        (tmp_path / name).touch()
    for name in ("old", ".old.x.partial", ".old.lock", ".gone.lock"):
        os.utime(tmp_path / name, (1, 1))
    # Of processes that were killed: an image, and one that was never finished.
    (tmp_path / "process-0-1").mkdir()
    (tmp_path / ".process-1-2.x.partial").mkdir()
    (tmp_path / ".process-1-2.lock").touch()
    (tmp_path / ".process-1.lock").touch()
    images.remove_unused()
    assert {p.name for p in tmp_path.iterdir()} == {"new", ".new.x.partial", ".new.lock"}


def test_what_one_process_has_is_never_anothers(tiny_base, tmp_path):
    """Every container counts its processes from one, and they may share a cache."""
    base, root = tiny_base("llama"), tmp_path / "images"
    specs = [str(random_adapter(base, tmp_path / n, r=2, seed=ord(n))) for n in "ab"]
    first, second = (DeltaImages(root, base, "int8") for _ in "ab")
    one = asyncio.run(first.make(first.own_folder(7), [specs[0]]))
    second.remove_unused(days=-1)
    assert DeltaImage.open(one.folder) == one, "its process is running"
    other = asyncio.run(second.make(second.own_folder(7), [specs[1]]))
    assert other.folder != one.folder and other.digest != one.digest
    # As the kernel does when the process ends.
    first._alive.release()
    second.remove_unused()
    assert not one.folder.exists() and other.folder.exists()
    assert not [p for p in root.glob(".*") if second._own not in p.name]


def test_what_is_being_written_keeps_its_lock(tmp_path):
    images = DeltaImages(tmp_path, tmp_path, "int8")
    with only_writer(tmp_path / "a", wait=True):
        (tmp_path / ".a.x.partial").mkdir()
        images.remove(tmp_path / "a")
        assert {p.name for p in tmp_path.iterdir()} == {".a.lock", ".a.x.partial"}
    images.remove(tmp_path / "a")
    assert not any(tmp_path.iterdir())


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tiny_base, tmp_path):
    """Mapped, it would end the process with SIGBUS."""
    base = tiny_base("llama")
    adapter = random_adapter(base, tmp_path / "a", r=2, seed=1, magnorm=NORMS["bounded"])
    _, image = _made(tmp_path, base, adapter, "int8")
    parts = image.read(image.modules)
    _, weight, _ = next(parts)
    os.truncate(image.folder / "delta.safetensors", 4096)
    assert weight.any()
    with pytest.raises(StorageError, match="the file ends early"):
        next(parts)


def test_a_pipe_in_the_place_of_an_image_is_not_waited_for(tiny_base, tmp_path):
    base = tiny_base("llama")
    adapter = random_adapter(base, tmp_path / "a", r=2, seed=1, magnorm=NORMS["bounded"])
    images, image = _made(tmp_path, base, adapter, "int8")
    for name in ("delta.json", "delta.safetensors"):
        (image.folder / name).unlink()
        os.mkfifo(image.folder / name)
        with pytest.raises(StorageError, match="no usable delta image"):
            DeltaImage.open(image.folder)
        assert asyncio.run(images.make(image.folder, [str(adapter)])) == image


def test_a_link_in_the_place_of_an_image_is_replaced_and_removed(tiny_base, tmp_path):
    base = tiny_base("llama")
    adapter = random_adapter(base, tmp_path / "a", r=2, seed=1, magnorm=NORMS["bounded"])
    images, image = _made(tmp_path, base, adapter, "int8")
    for there in (True, False):
        elsewhere = tmp_path / f"elsewhere-{there}"
        image.folder.rename(elsewhere)
        image.folder.symlink_to(elsewhere if there else tmp_path / "nowhere")
        assert asyncio.run(images.make(image.folder, [str(adapter)])) == image
        assert image.folder.is_symlink() == there
        if there:
            images.remove(image.folder)
            assert not os.path.lexists(image.folder) and elsewhere.exists()
            assert asyncio.run(images.make(image.folder, [str(adapter)])) == image


def test_the_end_of_the_process_waits_for_no_image(tiny_base, tmp_path, monkeypatch):
    base = tiny_base("llama")
    adapter = random_adapter(base, tmp_path / "a", r=2, seed=1, magnorm=NORMS["bounded"])
    made, read = [], content.update_stream
    images = DeltaImages(tmp_path / "images", base, "int8")

    def stream(*args):
        for update in read(*args):
            yield update
            made.append(update)
            images.stop()

    monkeypatch.setattr(content, "update_stream", stream)
    for name in "ab":
        with pytest.raises(StorageError, match="the server is stopping"):
            asyncio.run(images.make(images.folder(name, "0" * 32), [str(adapter)]))
    assert len(made) == 1
    assert not [p for p in images.root.iterdir() if p.is_dir()]


def test_a_folder_that_cannot_be_written_is_told(tiny_base, tmp_path):
    base, images = tiny_base("llama"), DeltaImages(tmp_path / "images", tiny_base("llama"), "int8")
    adapter = random_adapter(base, tmp_path / "a", r=2, seed=1, magnorm=NORMS["bounded"])
    folder = images.folder("a", "0" * 32)
    # Opening the lock fails, as on a file system that is mounted for reading.
    (images.root / f".{folder.name}.lock").mkdir(parents=True)
    with pytest.raises(StorageError, match=r"cannot be written .* another folder"):
        asyncio.run(images.make(folder, [str(adapter)]))
