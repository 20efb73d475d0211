"""Proves that a fold on a GPU reads each of the base's tensors once, keeps what there is room for,
and reads again what has changed.

Needs vLLM installed; no GPU: memory is pinned by a stand-in, since pinning needs a driver.
"""

from __future__ import annotations

import os

import pytest
import torch
from safetensors.torch import save_file

from secura_serve.checkpoint import Checkpoint
from secura_serve.serve.engine.fold.pristine import PristineCopies

CPU = torch.device("cpu")
MODULES = [f"model.layers.{i}.proj" for i in range(3)]


@pytest.fixture
def folder(tmp_path):
    _write(tmp_path, 0)
    return tmp_path


def _write(folder, seed):
    gen = torch.Generator().manual_seed(seed)
    tensors = {f"{m}.weight": torch.randn(8, 8, generator=gen) for m in MODULES}
    tensors |= {f"{m}.bias": torch.randn(8, generator=gen) for m in MODULES[1:]}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "llama"}')


def _same(got, folder):
    want = dict(Checkpoint(folder).tensors(MODULES))
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_the_second_fold_reads_no_file(folder, monkeypatch):
    pinned = []
    copies = PristineCopies(pin=lambda t: pinned.append(t) or t.clone())
    base = Checkpoint(folder)
    _same(dict(copies.stream(base, MODULES, CPU)), folder)
    assert len(pinned) == 5 and copies.nbytes == sum(t.nbytes for t in pinned)
    again = Checkpoint(folder)
    asked = []
    original = again.tensors
    monkeypatch.setattr(again, "tensors", lambda m: asked.extend(m) or original(m))
    _same(dict(copies.stream(again, MODULES, CPU)), folder)
    assert asked == [] and len(pinned) == 5


def test_files_that_changed_are_read_again(folder):
    copies = PristineCopies(pin=torch.clone)
    dict(copies.stream(Checkpoint(folder), MODULES, CPU))
    _write(folder, 1)
    os.utime(folder / "model.safetensors", ns=(1, 1))
    _same(dict(copies.stream(Checkpoint(folder), MODULES, CPU)), folder)


@pytest.mark.parametrize("room", [0, 300, 600, 700])
def test_what_has_no_room_is_read_each_time(room, folder):
    copies = PristineCopies(room=room, pin=torch.clone)
    for _ in range(3):
        _same(dict(copies.stream(Checkpoint(folder), MODULES, CPU)), folder)
        assert copies.nbytes <= room


def test_a_fold_that_ends_early_keeps_nothing_half_read(folder):
    copies = PristineCopies(pin=torch.clone)
    next(copies.stream(Checkpoint(folder), MODULES, CPU))
    _same(dict(copies.stream(Checkpoint(folder), MODULES, CPU)), folder)


def test_room_is_counted_in_the_powers_of_two_that_are_pinned(folder):
    # 8 x 8 float32 and 8 float32 are such already; these are 384 bytes, and take 512.
    odd = torch.zeros(12, 8)
    copies = PristineCopies(room=1000, pin=torch.clone)
    assert copies.lend(odd) and copies.nbytes == 512
    assert copies.lend(odd) is None
    copies.give_back([odd])
    assert copies.nbytes == 0
    assert copies.lend(odd, torch.zeros(100)) is None and copies.lend(odd, torch.zeros(64))


@pytest.mark.parametrize("given", range(6))
def test_where_the_system_pins_no_more_the_files_are_read(given, folder):
    asked = []

    def pin(tensor):
        asked.append(tensor)
        if len(asked) > given:
            raise RuntimeError("CUDA error: out of memory")
        return tensor.clone()

    copies = PristineCopies(pin=pin)
    for _ in range(3):
        _same(dict(copies.stream(Checkpoint(folder), MODULES, CPU)), folder)
    assert len(asked) == min(given + 1, 5)
    if given < 5:
        before = copies.nbytes
        assert copies.lend(torch.zeros(8)) is None and copies.nbytes == before
