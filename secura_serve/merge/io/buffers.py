"""Memory for tensors on their way from and to files: buffers, reading, digests."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from secura_serve.merge.io.layout import Stored

__all__ = ["DIGEST", "BufferRing", "as_bytes", "buffer", "digest", "opened", "read_tensor"]

DIGEST = "blake3"
"""The algorithm of :func:`digest`: it takes less time than reading the tensor."""


def buffer(nbytes: int) -> Tensor:
    """Return uninitialised bytes on the CPU, ``(nbytes,)`` uint8.

    NumPy asks the kernel for huge pages, without which the page faults of a fresh buffer cost
    more than what is done with it.
    """
    return torch.from_numpy(np.empty(nbytes, np.uint8))


class BufferRing:
    """``count`` buffers that are handed out in turn and grow to the largest size asked for.

    Fresh memory for every tensor would cost as much time as reading it: the kernel clears the
    pages, and giving them back stops all threads for a moment.
    """

    def __init__(self, count: int) -> None:
        self._buffers = [buffer(0) for _ in range(count)]
        self._turn = 0

    def __call__(self, nbytes: int) -> Tensor:
        """Return ``(nbytes,)`` uint8, valid until the ``count``-th call from here."""
        self._turn = (self._turn + 1) % len(self._buffers)
        if len(self._buffers[self._turn]) < nbytes:
            self._buffers[self._turn] = buffer(nbytes)
        return self._buffers[self._turn][:nbytes]


def read_tensor(
    fd: int,
    stored: Stored,
    allocate: Callable[[int], Tensor] = buffer,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Read one tensor from its file, whole.

    Args:
        dtype: what it is, unless it is a plain float.

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
    kind = dtype or stored.dtype
    assert kind is not None
    return raw.view(kind).view(stored.shape)


def as_bytes(tensor: Tensor) -> memoryview:
    """Return a contiguous CPU tensor's bytes, not copied."""
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data


def digest(stored: Stored, tensor: Tensor) -> str:
    """Return ``blake3:hex`` over dtype, shape and the stored bytes: equal means bit-equal."""
    # Here, because the kernels of a fold share this module and run where there is no BLAKE3.
    from blake3 import blake3

    state = blake3(f"{stored.code}|{'x'.join(map(str, stored.shape))}|".encode())
    state.update(as_bytes(tensor))
    return f"{DIGEST}:{state.hexdigest()}"


@contextmanager
def opened(path: Path) -> Iterator[int]:
    """Open a file for reading and yield its descriptor."""
    fd = os.open(path, os.O_RDONLY)
    try:
        yield fd
    finally:
        os.close(fd)
