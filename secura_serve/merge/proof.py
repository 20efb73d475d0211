"""The proof that a base's files hold the weights that the adapters were trained on.

Every fingerprint is compared before anything changes. Whoever folds the same files next can be
handed the proof's seal, and need not read them a second time.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from secura_serve.errors import MergeError
from secura_serve.merge.index import Shard, read_shard
from secura_serve.merge.pipe import Ring, ahead, opened, read_tensor
from secura_serve.merge.source import NOTHING, Source, open_source, plan_fold
from secura_serve.merge.stream import FoldPlan, look
from secura_serve.merge.weight import Target

__all__ = ["foreign", "prove", "quantised", "seal", "shards_of"]


def prove(base: str, specs: Sequence[str]) -> str:
    """Compare every module of the adapters with the base; returns the :func:`seal`.

    Args:
        base: alias, hub id or folder.
        specs: adapter folders, ``folder`` or ``folder*weight``.

    Raises:
        MergeError: with every problem found.
    """
    source = open_source(base, specs)
    plan = plan_fold(source)
    # Before the reading: a file that changes meanwhile must break it.
    found = seal(source, plan)
    if problems := foreign(source, plan):
        raise MergeError(NOTHING, problems)
    return found


def seal(source: Source, plan: FoldPlan) -> str:
    """Changes when a file of the base does, or what ``plan`` wants to find there.

    A digest over what the file system says of each shard (not over its bytes: that costs no
    reading), and over the indices and fingerprints of every target.
    """
    found = hashlib.sha256()
    for name in sorted(source.checkpoint.shards()):
        stat = os.stat(source.checkpoint.path / name)
        facts = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
        found.update(f"{name}|{facts}|".encode())
    for name, target in sorted(plan.targets.items()):
        for part in target.parts:
            indices = [index.tolist() for index in part.basis]
            found.update(f"{name}|{target.transposed}|{indices}|{part.print}|".encode())
    return found.hexdigest()


def foreign(source: Source, plan: FoldPlan) -> list[str]:
    """Targets in the base that are not what the adapters were trained on, or are quantised.

    Peak memory: two tensors, one of them being read.
    """
    shards = shards_of(source)
    problems = quantised(shards, plan)
    # As in `write_shards`: gathering columns took six times as long with torch's threads.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for target, tensor in ahead(_targets(source, shards, plan)):
            problems += look(tensor, target)[1]
            del tensor
    finally:
        torch.set_num_threads(threads)
    return problems


def quantised(shards: Iterable[Shard], plan: FoldPlan) -> list[str]:
    """Targets that are not plain floats, by the headers alone."""
    return [
        f"{t.name} is stored as {t.code}, a quantised weight: use the unquantised checkpoint"
        for shard in shards
        for t in shard.tensors
        if t.name in plan.targets and t.dtype is None
    ]


def shards_of(source: Source) -> list[Shard]:
    """The layouts of the base's files, in order of name."""
    base = source.checkpoint
    return [read_shard(base.path / name) for name in sorted(base.shards())]


def _targets(
    source: Source, shards: Iterable[Shard], plan: FoldPlan
) -> Iterator[tuple[Target, Tensor]]:
    """Each tensor is valid until the next but one is asked for."""
    # Not a mapping of the files: its pages would count as resident memory.
    ring = Ring(2)
    for shard in shards:
        with opened(source.checkpoint.path / shard.name) as file:
            for stored in shard.tensors:
                target = plan.targets.get(stored.name)
                if target is not None and stored.dtype is not None:
                    yield target, read_tensor(file, stored, ring)
