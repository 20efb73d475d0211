"""Where each tensor lies in its safetensors file, and where it will lie in the output file.

A safetensors file is 8 bytes (header length, little-endian), a JSON header and the tensors' bytes
without gaps. Knowing both layouts before any data moves lets untouched tensors be copied as bytes.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

__all__ = ["FLOATS", "Shard", "Stored", "read_shard", "with_dtype"]

FLOATS: Mapping[str, torch.dtype] = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
_CODES = {dtype: code for code, dtype in FLOATS.items()}


@dataclass(frozen=True)
class Stored:
    """One tensor in a file: ``begin`` and ``end`` count from the first byte of the file."""

    name: str
    code: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin

    @property
    def dtype(self) -> torch.dtype | None:
        """The torch dtype where it is a plain float, else None (integers, 8-bit floats)."""
        return FLOATS.get(self.code)


@dataclass(frozen=True)
class Shard:
    """One file: its length prefix and header as bytes, then its tensors in order of offset."""

    name: str
    head: bytes
    tensors: tuple[Stored, ...]
    metadata: Mapping[str, str]

    @property
    def nbytes(self) -> int:
        return self.tensors[-1].end if self.tensors else len(self.head)


def read_shard(path: Path) -> Shard:
    """Read the layout of a file that :class:`~secura_serve.checkpoint.Checkpoint` has checked."""
    with path.open("rb") as file:
        prefix = file.read(8)
        head = file.read(struct.unpack("<Q", prefix)[0])
    header = json.loads(head)
    metadata = header.pop("__metadata__", {})
    start = 8 + len(head)
    tensors = (
        Stored(name, t["dtype"], tuple(t["shape"]), *(start + at for at in t["data_offsets"]))
        for name, t in header.items()
    )
    return Shard(
        path.name, prefix + head, tuple(sorted(tensors, key=lambda t: (t.begin, t.end))), metadata
    )


def with_dtype(shard: Shard, dtype: torch.dtype | None) -> Shard:
    """Return the layout with every plain float in ``dtype``; None keeps all."""
    at, moved = 0, []
    for tensor in shard.tensors:
        code = tensor.code if dtype is None or tensor.dtype is None else _CODES[dtype]
        size = tensor.nbytes
        if code != tensor.code and dtype is not None:
            size = math.prod(tensor.shape) * dtype.itemsize
        moved.append(replace(tensor, code=code, begin=at, end=at + size))
        at += size
    header: dict[str, object] = {"__metadata__": dict(shard.metadata)} if shard.metadata else {}
    for tensor in moved:
        header[tensor.name] = {
            "dtype": tensor.code,
            "shape": list(tensor.shape),
            "data_offsets": [tensor.begin, tensor.end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    head = struct.pack("<Q", len(text)) + text
    placed = (replace(t, begin=t.begin + len(head), end=t.end + len(head)) for t in moved)
    return Shard(shard.name, head, tuple(placed), shard.metadata)
