"""Bytes on the way: whole tensors read, ranges copied in the kernel, writes behind the work."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from blake3 import blake3
from torch import Tensor

from secura_serve.merge.index import Stored
from secura_serve.merge.weight import buffer

__all__ = [
    "BEHIND",
    "DIGESTS",
    "Ring",
    "Writes",
    "ahead",
    "as_bytes",
    "copy_range",
    "digest",
    "opened",
    "read_tensor",
]

T = TypeVar("T")
# Larger writes are several times slower on ext4, which then looks for larger stretches of memory.
_CHUNK = 2**20
BEHIND = 2
DIGESTS: dict[str, Callable[[bytes], Any]] = {"blake3": blake3, "sha256": hashlib.sha256}


class Ring:
    """``count`` buffers in turn, each as large as the largest that was asked for.

    Fresh memory for every tensor would cost as much time as reading it: the kernel clears the
    pages, and giving them back stops all threads for a moment.
    """

    def __init__(self, count: int) -> None:
        self._buffers = [buffer(0) for _ in range(count)]
        self._turn = 0

    def __call__(self, nbytes: int) -> Tensor:
        """``(nbytes,)`` uint8, valid until the ``count``-th call from here."""
        self._turn = (self._turn + 1) % len(self._buffers)
        if len(self._buffers[self._turn]) < nbytes:
            self._buffers[self._turn] = buffer(nbytes)
        return self._buffers[self._turn][:nbytes]


def read_tensor(fd: int, stored: Stored, allocate: Callable[[int], Tensor] = buffer) -> Tensor:
    """One plain-float tensor from its file, whole.

    Raises:
        OSError: the file ends early.
    """
    # Not a mapping of the file: its pages would count as resident memory.
    raw = allocate(stored.nbytes)
    view, at = raw.numpy().data, 0
    while at < len(view):
        got = os.preadv(fd, [view[at : at + 2**30]], stored.begin + at)
        if not got:
            raise OSError(f"{stored.name}: the file ends early")
        at += got
    assert stored.dtype is not None
    return raw.view(stored.dtype).view(stored.shape)


def as_bytes(tensor: Tensor) -> memoryview:
    """A contiguous CPU tensor's bytes, not copied."""
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data


def digest(stored: Stored, tensor: Tensor, algorithm: str = "blake3") -> str:
    """``algorithm:hex`` over dtype, shape and the stored bytes: equal means bit-equal.

    BLAKE3 takes less time than reading the tensor, SHA-256 more than folding it.
    """
    found = DIGESTS[algorithm](f"{stored.code}|{'x'.join(map(str, stored.shape))}|".encode())
    found.update(as_bytes(tensor))
    return f"{algorithm}:{found.hexdigest()}"


@contextmanager
def opened(path: Path) -> Iterator[int]:
    """A descriptor for reading."""
    fd = os.open(path, os.O_RDONLY)
    try:
        yield fd
    finally:
        os.close(fd)


def copy_range(source: int, begin: int, target: int, at: int, count: int) -> Iterator[int]:
    """Copy ``count`` bytes between files inside the kernel where it can; yields the steps' sizes.

    File systems that share extents copy nothing at all.
    """
    kernel = hasattr(os, "copy_file_range")
    while count:
        size = min(count, _CHUNK)
        if kernel:
            try:
                done = os.copy_file_range(source, target, size, begin, at)
            except OSError:  # another file system, or one that cannot: a full disk fails below too
                kernel = False
                continue
        else:
            done = os.pwrite(target, os.pread(source, size, begin), at)
        if not done:
            raise OSError("the file ends early")
        begin, at, count = begin + done, at + done, count - done
        yield done


def ahead(items: Iterable[T]) -> Iterator[T]:
    """``items`` with the next one made in a thread while this one is used."""
    source, end = iter(items), object()
    with ThreadPoolExecutor(1, "read") as pool:
        coming: Future[Any] = pool.submit(next, source, end)
        while (item := coming.result()) is not end:
            coming = pool.submit(next, source, end)
            yield item
            del item


class Writes:
    """Writes in order in a thread, at most ``BEHIND`` waiting; fsyncs in a second one."""

    def __init__(self, progress: Callable[[int], object]) -> None:
        self._progress = progress
        self._pool, self._syncs = ThreadPoolExecutor(1, "write"), ThreadPoolExecutor(1, "sync")
        self._waiting: deque[Future[None]] = deque()
        self._synced: list[Future[None]] = []
        self._open: set[int] = set()

    def open(self, path: Path, *, new: bool = False) -> int:
        """A descriptor that is closed by :meth:`finish` or :meth:`stop`."""
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL if new else os.O_RDONLY, 0o666)
        self._open.add(fd)
        return fd

    def _submit(self, job: Callable[..., None], *args: Any) -> None:
        while len(self._waiting) >= BEHIND:
            self._waiting.popleft().result()
        self._waiting.append(self._pool.submit(job, *args))

    def put(self, fd: int, at: int, data: bytes | memoryview) -> None:
        self._submit(self._put, fd, at, data)

    def copy(self, source: int, begin: int, fd: int, at: int, count: int) -> None:
        self._submit(self._copy, source, begin, fd, at, count)

    def finish(self, *fds: int) -> None:
        """The first of ``fds`` is complete: fsync it; then close all."""
        self._submit(lambda: self._synced.append(self._syncs.submit(self._finish, *fds)))

    def close(self) -> None:
        """Wait for everything; raises what a thread raised."""
        for jobs in (self._waiting, self._synced):  # in this order: the first fill the second
            for job in jobs:
                job.result()

    def stop(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._syncs.shutdown()
        for fd in self._open:
            os.close(fd)

    def _put(self, fd: int, at: int, data: bytes | memoryview) -> None:
        view = memoryview(data)
        while view:
            done = os.pwrite(fd, view[:_CHUNK], at)
            at, view = at + done, view[done:]
            self._progress(done)

    def _copy(self, source: int, begin: int, fd: int, at: int, count: int) -> None:
        for done in copy_range(source, begin, fd, at, count):
            self._progress(done)

    def _finish(self, *fds: int) -> None:
        os.fsync(fds[0])
        for fd in fds:
            self._open.remove(fd)
            os.close(fd)
