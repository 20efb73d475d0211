"""Checking that a base's files hold the weights that the adapters were trained on.

Every fingerprint is compared before anything changes. :func:`verify_base` returns a stamp; whoever
folds the same files next and finds the same :func:`base_stamp` need not read them a second time.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from secura_serve.errors import MergeError
from secura_serve.merge.fold import Target, gather_target
from secura_serve.merge.io.async_io import read_ahead
from secura_serve.merge.io.buffers import BufferRing, opened, read_tensor
from secura_serve.merge.io.layout import Shard, read_shard
from secura_serve.merge.source import NOTHING_DONE, Source, open_source, plan_fold
from secura_serve.merge.stream import FoldPlan

__all__ = ["base_mismatches", "base_stamp", "quantised_targets", "shards_of", "verify_base"]


def verify_base(base: str, specs: Sequence[str]) -> str:
    """Compare every module of the adapters with the base; returns the :func:`base_stamp`.

    Args:
        base: alias, hub id or folder.
        specs: adapter folders, ``folder`` or ``folder*weight``.

    Raises:
        MergeError: with every problem found.
    """
    source = open_source(base, specs)
    plan = plan_fold(source)
    # Before the reading: a file that changes meanwhile must change the stamp.
    stamp = base_stamp(source, plan)
    if problems := base_mismatches(source, plan):
        raise MergeError(NOTHING_DONE, problems)
    return stamp


def base_stamp(source: Source, plan: FoldPlan) -> str:
    """Return a digest that changes with the base's files and with what ``plan`` expects of them.

    It covers what the file system says of each shard (not its bytes, so that nothing is read),
    and the indices and fingerprints of every target.
    """
    state = hashlib.sha256()
    for name in sorted(source.checkpoint.shards()):
        stat = os.stat(source.checkpoint.path / name)
        facts = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
        state.update(f"{name}|{facts}|".encode())
    for name, target in sorted(plan.targets.items()):
        for part in target.parts:
            indices = [index.tolist() for index in part.basis]
            state.update(f"{name}|{target.transposed}|{indices}|{part.fingerprint}|".encode())
    return state.hexdigest()


def base_mismatches(source: Source, plan: FoldPlan) -> list[str]:
    """Return the targets that are not what the adapters were trained on, or are quantised.

    Peak memory: two tensors, one of them being read.
    """
    shards = shards_of(source)
    problems = quantised_targets(shards, plan)
    # As in `write_shards`: gathering columns took six times as long with torch's threads.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for target, tensor in read_ahead(_targets(source, shards, plan)):
            problems += gather_target(tensor, target)[1]
            del tensor
    finally:
        torch.set_num_threads(threads)
    return problems


def quantised_targets(shards: Iterable[Shard], plan: FoldPlan) -> list[str]:
    """Return the targets that are not plain floats, by the headers alone."""
    return [
        f"{t.name} is stored as {t.code}, a quantised weight: use the unquantised checkpoint"
        for shard in shards
        for t in shard.tensors
        if t.name in plan.targets and t.dtype is None
    ]


def shards_of(source: Source) -> list[Shard]:
    """Return the layouts of the base's files, in order of name."""
    base = source.checkpoint
    return [read_shard(base.path / name) for name in sorted(base.shards())]


def _targets(
    source: Source, shards: Iterable[Shard], plan: FoldPlan
) -> Iterator[tuple[Target, Tensor]]:
    """Yield target and tensor; a tensor is valid until the next but one is asked for."""
    # Not a mapping of the files: its pages would count as resident memory.
    ring = BufferRing(2)
    for shard in shards:
        with opened(source.checkpoint.path / shard.name) as file:
            for stored in shard.tensors:
                target = plan.targets.get(stored.name)
                if target is not None and stored.dtype is not None:
                    yield target, read_tensor(file, stored, ring)
