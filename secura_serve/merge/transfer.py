"""Moving a plan's bytes: the base's tensors in, the folded shards out.

Three things overlap: reading (and hashing) the next tensor, folding this one, writing the last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from secura_serve.errors import MergeError
from secura_serve.merge.index import Shard, Stored
from secura_serve.merge.pipe import BEHIND, Ring, Writes, ahead, as_bytes, digest, read_tensor
from secura_serve.merge.plan import MergePlan
from secura_serve.merge.stream import fold_stream
from secura_serve.merge.weight import Change

__all__ = ["CopyRun", "Decode", "is_decoded", "outgoing", "runs", "write_shards"]


class CopyRun(NamedTuple):
    """A stretch of bytes that does not change: where it begins, where it goes, how long it is."""

    begin: int
    at: int
    size: int


class Decode(NamedTuple):
    """A tensor that changes: as it lies in the base and as it will lie in the output."""

    stored: Stored
    placed: Stored


def runs(old: Shard, new: Shard, decoded: Callable[[Stored], bool]) -> Iterator[CopyRun | Decode]:
    """A shard's work in file order, neighbouring untouched tensors as one stretch."""
    begin = at = size = 0
    for stored, placed in zip(old.tensors, new.tensors, strict=True):
        if decoded(stored):
            if size:
                yield CopyRun(begin, at, size)
            size = 0
            yield Decode(stored, placed)
            continue
        if not size:
            begin, at = stored.begin, placed.begin
        size += stored.nbytes
    if size:
        yield CopyRun(begin, at, size)


def is_decoded(plan: MergePlan) -> Callable[[Stored], bool]:
    """Which tensors cannot travel as bytes: targets, and floats that change their dtype."""
    kind = plan.fold.dtype

    def decoded(stored: Stored) -> bool:
        cast = kind is not None and stored.dtype not in (None, kind)
        return stored.nbytes > 0 and (cast or stored.name in plan.fold.targets)

    return decoded


def originals(plan: MergePlan, digests: dict[str, str]) -> Iterator[tuple[str, Tensor]]:
    """The base's decoded tensors in the order of :func:`runs`; fills ``digests`` for targets."""
    decoded = is_decoded(plan)
    # One in use, one being read: `ahead` starts on a third when the first is done with.
    ring = Ring(2)
    for old, _ in plan.shards:
        with open(plan.source.checkpoint.path / old.name, "rb") as file:
            for stored in filter(decoded, old.tensors):
                tensor = read_tensor(file.fileno(), stored, ring)
                if stored.name in plan.fold.targets:
                    digests[stored.name] = digest(stored, tensor)
                yield stored.name, tensor
                del tensor


def outgoing(
    plan: MergePlan, digests: dict[str, str], observe: Callable[[str, Change], None] | None
) -> Iterator[Tensor]:
    """The output's decoded tensors, in the order of :func:`runs`."""
    kind = plan.fold.dtype
    # One being made, BEHIND waiting for the disk.
    ring = Ring(BEHIND + 1)
    for name, tensor in fold_stream(ahead(originals(plan, digests)), plan.fold, observe, ring):
        if kind is not None and tensor.dtype != kind:
            tensor = tensor.to(kind)
            if not torch.isfinite(tensor).all():
                raise MergeError(f"{name}: NaN or Inf in the base, or beyond {kind}")
        yield tensor
        del tensor


def write_shards(
    plan: MergePlan,
    work: Path,
    observe: Callable[[str, Change], None],
    progress: Callable[[int], object],
) -> dict[str, str]:
    """Write every shard of ``plan`` into ``work``; returns the digests of the base's targets.

    Raises:
        MergeError: what :func:`fold_stream` finds.
        OSError: reading or writing fails.

    Peak memory: two tensors of the base (one being read) and up to three folded ones (one being
    made, two waiting for the disk), whatever the size of the checkpoint.
    """
    digests: dict[str, str] = {}
    # Freeing one large block teaches glibc to keep what is freed after it. Otherwise the blocks
    # of the fold go back to the kernel one by one, and come again as page faults.
    torch.empty(31 * 2**20, dtype=torch.uint8)
    # torch's threads would meet after every small operation, and stall while a core is reading,
    # hashing or writing: measured at three times slower on two cores.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    decoded, writes = is_decoded(plan), Writes(progress)
    tensors = outgoing(plan, digests, observe)
    try:
        for old, new in plan.shards:
            source = writes.open(plan.source.checkpoint.path / old.name)
            fd = writes.open(work / new.name, new=True)
            writes.put(fd, 0, new.head)
            for run in runs(old, new, decoded):
                if isinstance(run, CopyRun):
                    writes.copy(source, run.begin, fd, run.at, run.size)
                else:
                    writes.put(fd, run.placed.begin, as_bytes(next(tensors)))
            writes.finish(fd, source)
        # The stream complains at its end about targets that never came.
        for _ in tensors:
            raise AssertionError("a tensor has no place in the output")
        writes.close()
    finally:
        # Before the folder is removed: no thread may write to it any more.
        writes.stop()
        torch.set_num_threads(threads)
    return digests
