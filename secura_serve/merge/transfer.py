"""Carrying out a plan: the base's tensors are read, folded and written as shards.

Three things overlap: reading and hashing the next tensor, folding this one, writing the last one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from secura_serve.errors import MergeError
from secura_serve.merge.fold import Change
from secura_serve.merge.io.async_io import MAX_WAITING, WriteQueue, read_ahead
from secura_serve.merge.io.buffers import BufferRing, as_bytes, digest, read_tensor
from secura_serve.merge.io.layout import Shard, Stored
from secura_serve.merge.plan import MergePlan
from secura_serve.merge.stream import fold_stream

__all__ = ["CopyRange", "DecodeTensor", "is_decoded", "output_tensors", "steps", "write_shards"]


class CopyRange(NamedTuple):
    """A stretch of bytes that does not change: where it begins, where it goes, how long it is."""

    begin: int
    at: int
    size: int


class DecodeTensor(NamedTuple):
    """A tensor that changes: as it lies in the base and as it will lie in the output."""

    stored: Stored
    placed: Stored


def steps(
    old: Shard, new: Shard, decoded: Callable[[Stored], bool]
) -> Iterator[CopyRange | DecodeTensor]:
    """Yield a shard's work in file order, neighbouring untouched tensors as one stretch."""
    begin = at = size = 0
    for stored, placed in zip(old.tensors, new.tensors, strict=True):
        if decoded(stored):
            if size:
                yield CopyRange(begin, at, size)
            size = 0
            yield DecodeTensor(stored, placed)
            continue
        if not size:
            begin, at = stored.begin, placed.begin
        size += stored.nbytes
    if size:
        yield CopyRange(begin, at, size)


def is_decoded(plan: MergePlan) -> Callable[[Stored], bool]:
    """Return a test for tensors that cannot be copied as bytes: targets, and floats to be cast."""
    dtype = plan.fold.dtype

    def decoded(stored: Stored) -> bool:
        cast = dtype is not None and stored.dtype not in (None, dtype)
        return stored.nbytes > 0 and (cast or stored.name in plan.fold.targets)

    return decoded


def _base_tensors(plan: MergePlan, digests: dict[str, str]) -> Iterator[tuple[str, Tensor]]:
    """Yield the base's decoded tensors in the order of :func:`steps`; fills in ``digests``."""
    decoded = is_decoded(plan)
    # One in use, one being read: `read_ahead` starts on a third when the first is done with.
    ring = BufferRing(2)
    for old, _ in plan.shards:
        with open(plan.source.checkpoint.path / old.name, "rb") as file:
            for stored in filter(decoded, old.tensors):
                tensor = read_tensor(file.fileno(), stored, ring)
                if stored.name in plan.fold.targets:
                    digests[stored.name] = digest(stored, tensor)
                yield stored.name, tensor
                del tensor


def output_tensors(
    plan: MergePlan, digests: dict[str, str], observe: Callable[[str, Change], None] | None
) -> Iterator[Tensor]:
    """Yield the output's decoded tensors, in the order of :func:`steps`."""
    dtype = plan.fold.dtype
    # One being made, MAX_WAITING waiting for the disk.
    ring = BufferRing(MAX_WAITING + 1)
    for name, tensor in fold_stream(
        read_ahead(_base_tensors(plan, digests)), plan.fold, observe, ring
    ):
        if dtype is not None and tensor.dtype != dtype:
            tensor = tensor.to(dtype)
            if not torch.isfinite(tensor).all():
                raise MergeError(f"{name}: NaN or Inf in the base, or beyond {dtype}")
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
    decoded, writes = is_decoded(plan), WriteQueue(progress)
    tensors = output_tensors(plan, digests, observe)
    try:
        for old, new in plan.shards:
            source = writes.open(plan.source.checkpoint.path / old.name)
            fd = writes.open(work / new.name, new=True)
            writes.put(fd, 0, new.head)
            for step in steps(old, new, decoded):
                if isinstance(step, CopyRange):
                    writes.copy(source, step.begin, fd, step.at, step.size)
                else:
                    writes.put(fd, step.placed.begin, as_bytes(next(tensors)))
            writes.finish(fd, source)
        # The stream raises at its end if a target was not in it.
        for _ in tensors:
            raise AssertionError("a tensor has no place in the output")
        writes.close()
    finally:
        # Before the folder is removed: no thread may write to it any more.
        writes.stop()
        torch.set_num_threads(threads)
    return digests
