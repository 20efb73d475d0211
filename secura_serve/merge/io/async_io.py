"""Reading ahead, copying in the kernel and writing behind, so that disk and processor overlap."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

__all__ = ["MAX_WAITING", "WriteQueue", "copy_range", "read_ahead"]

T = TypeVar("T")
# Larger writes are several times slower on ext4, which then looks for larger stretches of memory.
_CHUNK = 2**20
MAX_WAITING = 2
"""Writes that may wait for the disk: as many tensors are held in memory for them."""


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


def read_ahead(items: Iterable[T]) -> Iterator[T]:
    """Yield ``items``, the next one made in a thread while this one is used."""
    source, end = iter(items), object()
    with ThreadPoolExecutor(1, "read") as pool:
        coming: Future[Any] = pool.submit(next, source, end)
        while (item := coming.result()) is not end:
            coming = pool.submit(next, source, end)
            yield item
            del item


class WriteQueue:
    """Writes in order in a thread, at most :data:`MAX_WAITING` waiting; fsyncs in a second one."""

    def __init__(self, progress: Callable[[int], object]) -> None:
        self._progress = progress
        self._pool, self._syncs = ThreadPoolExecutor(1, "write"), ThreadPoolExecutor(1, "sync")
        self._waiting: deque[Future[None]] = deque()
        self._synced: list[Future[None]] = []
        self._open: set[int] = set()

    def open(self, path: Path, *, new: bool = False) -> int:
        """Return a descriptor that is closed by :meth:`finish` or :meth:`stop`."""
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL if new else os.O_RDONLY, 0o666)
        self._open.add(fd)
        return fd

    def _submit(self, job: Callable[..., None], *args: Any) -> None:
        while len(self._waiting) >= MAX_WAITING:
            self._waiting.popleft().result()
        self._waiting.append(self._pool.submit(job, *args))

    def put(self, fd: int, at: int, data: bytes | memoryview) -> None:
        self._submit(self._put, fd, at, data)

    def copy(self, source: int, begin: int, fd: int, at: int, count: int) -> None:
        self._submit(self._copy, source, begin, fd, at, count)

    def finish(self, *fds: int) -> None:
        """Fsync the first of ``fds``, which is complete, then close all."""
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
