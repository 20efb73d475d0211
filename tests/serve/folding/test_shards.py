"""Proves that a rank folds its own part of each linear where it lies, and takes it back to the last
bit: vLLM's own layers as any rank of many holds them, against W folded whole in float64 and cut
afterwards; and that whatever is not plain is left to vLLM's reload.

Needs vLLM installed; no engine, no GPU. What a journal does needs the package ``triton``, whose
interpreter runs in a process of its own.
"""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch

from secura_serve.checkpoint import Checkpoint
from secura_serve.errors import MergeError
from secura_serve.method import MagNorm
from secura_serve.serve import compat
from tests.support import interpreted, sharded
from tests.support.engines import random_adapter
from tests.support.sharded import DTYPE, NOTHING, Rank, blind

BOUNDED = MagNorm("bounded", tau=0.05)
ALL = [f"model.layers.{i}.{name}" for i in (0, 1) for name in sharded.SHAPES]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return sharded.write_base(tmp_path_factory.mktemp("shards") / "base", DTYPE)


@pytest.fixture(scope="module")
def adapters(base):
    folder = base.parent
    return {
        "bounded": random_adapter(base, folder / "b", r=8, seed=1, magnorm=BOUNDED, size=20),
        "another": random_adapter(base, folder / "c", r=8, seed=5, magnorm=BOUNDED, size=20),
        "some": random_adapter(base, folder / "s", r=4, seed=2, only=("q_proj", "down_proj")),
        "scaled": random_adapter(base, folder / "p", r=8, seed=3, magnorm=MagNorm("published")),
    }


@pytest.mark.parametrize(("rank", "size"), [(0, 1), (1, 2), (0, 4), (3, 4), (6, 8)])
def test_every_rank_folds_its_part_and_takes_it_back(rank, size, base, adapters):
    ours = Rank(base, rank, size)
    ours.check()
    for name in ("bounded", "some", "another", None, "some", None):
        changed = set(ours.dirty)
        taken = ours.fold(adapters.get(name))
        assert set(taken) == changed | ours.dirty
        ours.check(adapters.get(name))
    assert set(ours.shards.take(Checkpoint(base), NOTHING, ALL)) == set(ALL)


def test_the_base_is_read_once_and_each_rank_keeps_its_part_alone(base, adapters, monkeypatch):
    ours = [Rank(base, rank, 4) for rank in range(4)]
    for rank in ours:
        rank.fold(adapters["bounded"])
    whole = sum(W.numel() for W in sharded.whole(base).values()) * DTYPE.itemsize
    factors = 8 * sum(sum(shape) for shape in sharded.SHAPES.values()) * 2 * DTYPE.itemsize
    kept = [rank.copies.nbytes for rank in ours]
    # C of a rank's rows or R of its columns; KV heads are held twice.
    assert whole / 4 < kept[0] < whole / 3 + factors
    monkeypatch.setattr(Checkpoint, "tensors", lambda self, modules: iter(_none(modules)))
    for rank, before in zip(ours, kept, strict=True):
        rank.fold(adapters["another"], checked=True)
        rank.check(adapters["another"])
        rank.fold()
        rank.check()
        assert rank.copies.nbytes == before


def _none(modules):
    assert not list(modules), "the files were read again"
    return ()


def test_without_room_the_files_bring_the_base_back(base, adapters):
    ours = Rank(base, 1, 2, room=0)
    for name in ("bounded", "some", None):
        ours.fold(adapters.get(name))
        ours.check(adapters.get(name))
    assert ours.copies.nbytes == 0


def test_where_nothing_can_be_pinned_the_files_bring_the_base_back(base, adapters):
    def refuse(tensor):
        raise RuntimeError("CUDA error: out of memory")

    ours = Rank(base, 1, 2)
    ours.copies._pin = refuse
    for name in ("bounded", "some", None):
        assert ours.fold(adapters.get(name))
        ours.check(adapters.get(name))
    assert ours.copies.nbytes == 0


def _reordered(model):
    model.linear(ALL[0])[0].weight.data[:2] = model.linear(ALL[0])[0].weight.data[:2].flip(0)


def _ends_otherwise(model):
    model.linear(ALL[0])[0].weight.data[-1, -1] += 1


def _quantised(model):
    model.linear(ALL[0])[0].quant_method = object()


def _padded(model):
    linear = model.linear(ALL[0])[0]
    linear.weight.data = torch.cat([linear.weight.data, linear.weight.data[:, :8]], 1)


def _packed(model):
    linear = model.linear(ALL[0])[0]
    linear.weight = torch.nn.Parameter(torch.empty(0), requires_grad=False)


def _held_twice(model):
    model.attention = model.linear(ALL[0])[0]


def _narrower(model):
    linear = model.linear(ALL[0])[0]
    linear.weight.data = linear.weight.data.half()


@pytest.mark.parametrize(
    "spoil",
    [_reordered, _ends_otherwise, _quantised, _padded, _packed, _held_twice, _narrower],
    ids=lambda spoil: spoil.__name__[1:],
)
def test_what_is_not_plain_is_left_to_the_reload_with_its_siblings(
    spoil, base, adapters, monkeypatch
):
    monkeypatch.setattr("secura_serve.serve.engine.fold.shards._COMPARED_BYTES", 1000)
    ours = Rank(base, 0, 2, spoil=spoil)
    before = [p.clone() for p in ours.model.linear(ALL[0])[0].parameters()]
    taken = ours.fold(adapters["bounded"])
    qkv = {f"model.layers.0.self_attn.{part}" for part in sharded.PACKED["qkv_proj"]}
    assert set(taken) == set(ALL) - qkv
    after = ours.model.linear(ALL[0])[0].parameters()
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    # Found out once.
    assert set(ours.fold()) == set(ALL) - qkv


def test_what_is_offloaded_is_left_to_the_reload(base, adapters, monkeypatch):
    # What a parameter holds may be another layer's weight a moment later.
    monkeypatch.setattr("vllm.model_executor.offloader.base.get_offloader", object)
    ours = Rank(base, 0, 2)
    assert ours.fold(adapters["bounded"]) == []
    ours.check()


def test_two_launches_a_linear_at_most_and_one_for_the_way_back(tmp_path, monkeypatch):
    pytest.importorskip("triton", reason="no triton package")
    from benchmarks._launches import caught
    from secura_serve.merge.fold import shard, triton_code

    monkeypatch.setattr(shard, "takes_triton", lambda *given: True)
    half = sharded.write_base(tmp_path / "base", torch.float16)
    ours = Rank(half, 1, 2, torch.float16, journal_room=10**9)
    narrow, plain = (
        random_adapter(half, tmp_path / norm.mode, r=8, seed=1, magnorm=norm)
        for norm in (MagNorm("bounded", tau=0.002), MagNorm())
    )
    # From the base, from one to the next, back by the journal; and without one, by a copy.
    for adapter, each in ((narrow, 2), (narrow, 2), (None, 1), (plain, 2), (plain, 2), (None, 0)):
        with caught(triton_code) as launches:
            ours.fold(adapter)
        assert len(launches) == each * len(ALL), (adapter, each)


def test_a_mode_that_must_see_all_of_w_is_left_to_the_reload(base, adapters):
    ours = Rank(base, 0, 2)
    plan = ours.plan(adapters["scaled"])
    assert set(ours.shards.take(Checkpoint(base), plan, ALL)) == set(ALL)
    assert ours.shards.take(Checkpoint(base), blind(plan), ALL) == []


def test_what_a_reload_wrote_is_not_taken_for_the_base(base, adapters):
    ours = Rank(base, 0, 2)
    assert ours.shards.take(Checkpoint(base), blind(ours.plan(adapters["scaled"])), ALL) == []
    ours.shards.reloaded(ALL[:3], moved=ALL[:1])
    # Never compared and no longer the base: the reload again, siblings too.
    assert set(ours.fold(adapters["some"])) == {m for m in ALL if "q_proj" in m or "down" in m} - {
        ALL[0]
    }
    ours.shards.reloaded(ALL[:3], moved=[])
    ours.fold(adapters["some"])
    ours.check(adapters["some"])
    ours.model.linear(ALL[0])[0].weight.data.fill_(7)
    ours.shards.reloaded(ALL[:3], moved=ALL[:3])
    ours.dirty = set(ALL)
    ours.fold()
    ours.check()


def test_another_base_changes_nothing_and_a_fold_that_overflows_can_be_taken_back(base, adapters):
    ours = Rank(base, 1, 2)
    plan = ours.plan(adapters["bounded"])
    name, target = list(plan.targets.items())[-1]
    foreign = replace(target, parts=(replace(target.parts[0], fingerprint="0" * 32),))
    with pytest.raises(MergeError, match="another base|was trained on") as caught:
        ours.fold(plan=replace(plan, targets=plan.targets | {name: foreign}))
    assert target.module in str(caught.value.problems)
    ours.check()
    wild = replace(target, parts=(replace(target.parts[0], U=target.parts[0].U * 3e38),))
    with pytest.raises(MergeError, match="NaN or Inf"):
        ours.fold(plan=replace(plan, targets=plan.targets | {name: wild}, norm=MagNorm()))
    ours.fold()
    ours.check()


def test_files_that_changed_are_compared_again(base, adapters, tmp_path):
    copy = sharded.write_base(tmp_path / "copy", DTYPE)
    ours = Rank(copy, 0, 2)
    ours.fold(adapters["bounded"])
    ours.fold()
    sharded.write_base(copy, DTYPE, seed=1)
    os.utime(copy / "model.safetensors", ns=(1, 1))
    # The model holds what the files held before.
    assert ours.shards.take(Checkpoint(copy), NOTHING, ALL) == []
    assert ours.copies.nbytes == 0


def test_a_weight_that_the_file_holds_transposed(base):
    """GPT-2's: the rank's part of what it is, not of what the file shows."""
    linear, _ = sharded.Model(base, 1, 2, DTYPE).linear(ALL[3])

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = linear

        def load_weights(self, weights):
            for _, tensor in weights:
                linear.weight.weight_loader(linear.weight, tensor.t())

    W = sharded.whole(base)[ALL[3]].float()
    (param,) = compat.find_param_shards(Model(), [("w", W.T.contiguous(), True)]).values()
    assert (param.rows, param.cols) == (slice(0, 64), slice(64, 128))
    assert param.held.data_ptr() == linear.weight.data_ptr()
    # Taken for one that is not, it would be square and wrong; here it is in another order.
    assert not compat.find_param_shards(Model(), [("w", W.T.contiguous(), False)])


JOURNALS = """
import pathlib, tempfile, torch
from secura_serve.merge import undo_shard
from secura_serve.merge.fold import shard
from secura_serve.method import MagNorm
from secura_serve.serve.engine.fold import shards
from tests.support import sharded
from tests.support.engines import random_adapter

shard.takes_triton = lambda *given: True
folder = pathlib.Path(tempfile.mkdtemp())
base = sharded.write_base(folder / "base", torch.float16)
norms = {"four": MagNorm("bounded", tau=0.002), "eight": MagNorm("bounded", tau=0.02),
         "wide": MagNorm("bounded", tau=0.3), "none": MagNorm()}
adapters = {name: random_adapter(base, folder / name, r=8, seed=i, magnorm=norm,
                                 size=20 if i < 3 else 0.4)
            for i, (name, norm) in enumerate(norms.items())}
ours = sharded.Rank(base, 1, 2, torch.float16, journal_room=10**9)
asked, undone = [], []
original = ours.shards._pristine
ours.shards._pristine = lambda base, module: asked.append(module) or original(base, module)
def journals():
    return {s.journal.bits if s.journal else 0 for s in ours.shards._shards.values()}
for name, bits in (("four", 4), ("eight", 8), ("four", 4), (None, 0), ("eight", 8), ("none", 0)):
    ours.fold(adapters.get(name))
    ours.check(adapters.get(name))
    assert journals() == {bits}, (name, journals())
# None of that asked for the base: what it was lay beside what became of it.
assert not asked
for name in ("wide", None):
    ours.fold(adapters.get(name))
    ours.check(adapters.get(name))
    assert journals() == {0}
assert len(asked) == 2 * 14
# A journal that is too narrow after all is not kept.
asked.clear()
shards.bits_to_keep = lambda held, target, norm: 4
for name in ("eight", None):
    ours.fold(adapters.get(name))
    ours.check(adapters.get(name))
assert journals() == {0} and len(asked) == 14
# A mode without kernels finds the base by the journal, too.
shards.bits_to_keep = shard.bits_to_keep
ours.fold(adapters["four"])
asked.clear()
shard.takes_triton = lambda held, target, norm: norm.mode != "none"
ours.fold(adapters["none"])
ours.check(adapters["none"])
assert not asked and journals() == {0}
shard.takes_triton = lambda *given: True
# Nor is there one without room.
ours = sharded.Rank(base, 0, 2, torch.float16, journal_room=2000)
ours.fold(adapters["four"])
held = [s.journal.data.nbytes for s in ours.shards._shards.values() if s.journal]
assert 0 < sum(held) <= 2000 and len(held) < 14
ours.fold()
ours.check()
# The device may have less to give than at the first fold.
ours, empty = sharded.Rank(base, 0, 2, torch.float16, journal_room=10**9), shards.Journal.empty
def scarce(held, bits):
    if len(given) == 3:
        raise torch.OutOfMemoryError("out of memory")
    given.append(bits)
    return empty(held, bits)
given, shards.Journal.empty = [], scarce
for name in ("four", None):
    ours.fold(adapters.get(name))
    ours.check(adapters.get(name))
    assert sum(s.journal is not None for s in ours.shards._shards.values()) == 3 * bool(name)
"""


@pytest.mark.long
def test_journals_bring_the_base_back_without_it():
    pytest.importorskip("triton", reason="no triton package")
    interpreted.run(JOURNALS, interpreted=True)
