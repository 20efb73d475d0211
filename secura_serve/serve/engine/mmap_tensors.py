"""Tensors that lie in a file that nobody else can reach.

An adapter that loses its slot is needed again in the middle of a batch. Memory for all of them may
not be there, and reading its folder then could fail, which would end the engine. So what a worker
made of the folder is written once to a file without a name: no other process can change or delete
it, and the operating system keeps as much of it in memory as there is room for.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from secura_serve.errors import StorageError

__all__ = ["map_tensors"]

_ALIGNMENT = 64


def map_tensors(tensors: Sequence[Tensor], folder: Path) -> list[Tensor]:
    """Write CPU tensors to a deleted file in ``folder`` and return views that map it.

    The views are for reading: a write would change what the next reader sees. The space is free
    again when the last view is gone.

    Raises:
        StorageError: the file cannot be written.
    """
    sizes = [-(-t.nbytes // _ALIGNMENT) * _ALIGNMENT for t in tensors]
    if not sum(sizes):
        return [t.clone() for t in tensors]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".mapped-") as file:
            for tensor, size in zip(tensors, sizes, strict=True):
                raw = tensor.contiguous().flatten().view(torch.uint8).numpy()
                file.write(raw.tobytes().ljust(size, b"\0"))
            # Mapping a file that is shorter than it seems would end the process, not raise.
            file.flush()
            whole = torch.from_file(file.name, shared=True, size=sum(sizes), dtype=torch.uint8)
    except OSError as error:
        raise StorageError(
            f"an adapter cannot be kept in {folder} ({error}); free some space there, or point "
            "SECURA_CACHE at another folder"
        ) from error
    starts = [0, *accumulate(sizes)]
    return [
        whole[start : start + t.nbytes].view(t.dtype).view(t.shape)
        for t, start in zip(tensors, starts, strict=False)
    ]
