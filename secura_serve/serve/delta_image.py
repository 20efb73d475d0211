"""The update of a whole adapter as a file that workers copy into a slot: a *delta image*.

An adapter that S-MagNorm makes full-rank is W' = W + D with D as large as W, so its D are computed
once for all ranks and starts, and kept as::

    <folder>/delta.safetensors   NAME.weight (out, in) int8 or float32, NAME.scale (out,) float32
    <folder>/delta.json          dtype, modules, size of the other file, error; written last

D of a row is its scale times its ``weight``. A rank reads the rows or columns that it holds.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from blake3 import blake3
from torch import Tensor

from secura_serve.errors import StorageError
from secura_serve.merge.io.buffers import opened, read_tensor
from secura_serve.merge.io.layout import read_shard
from secura_serve.method import dequantise_rows, quantise_rows
from secura_serve.system.atomic import atomic_folder

__all__ = ["DTYPES", "DeltaImage", "image_nbytes", "write_image"]

DTYPES: Mapping[str, torch.dtype] = {"int8": torch.int8, "float32": torch.float32}
_CODES = {"int8": "I8", "float32": "F32"}
_WEIGHTS, _FACTS = "delta.safetensors", "delta.json"
_FORMAT = 2


def image_nbytes(shapes: Iterable[tuple[int, int]], dtype: str) -> int:
    """Return the bytes of updates of these shapes: Σ out·in·width + 4·out."""
    width = DTYPES[dtype].itemsize
    return sum(out * inner * width + 4 * out for out, inner in shapes)


def write_image(
    folder: Path,
    shapes: Mapping[str, tuple[int, int]],
    updates: Iterable[tuple[str, Tensor]],
    dtype: str,
) -> DeltaImage:
    """Write the updates of a stream, which need not be in memory together, and open the result.

    Args:
        folder: appears whole or not at all.
        shapes: module -> (out, in), of every update in the stream.
        updates: module and D ``(out, in)`` float32, in the order of ``shapes``.
        dtype: ``int8`` or ``float32``.

    Raises:
        StorageError: it cannot be written.
    """
    error = total = 0.0
    try:
        with atomic_folder(folder) as new:
            with (new / _WEIGHTS).open("wb") as file:
                file.write(_header(shapes, dtype))
                for (module, D), expected in zip(updates, shapes, strict=True):
                    assert module == expected and D.shape == shapes[module]
                    weight, scale = _encode(D, dtype)
                    lost = dequantise_rows(weight, scale) - D
                    error += float(torch.linalg.vector_norm(lost)) ** 2
                    total += float(torch.linalg.vector_norm(D)) ** 2
                    _write(file, weight)
                    _write(file, scale)
                size = file.tell()
                file.flush()
                digest = _digest(new / _WEIGHTS)
            facts = {
                "format": _FORMAT,
                "dtype": dtype,
                "modules": list(shapes),
                "size": size,
                "digest": digest,
                "error": math.sqrt(error / total) if total else 0.0,
            }
            (new / _FACTS).write_text(json.dumps(facts))
    except OSError as problem:
        raise StorageError(
            f"the weights' changes of an adapter cannot be kept in {folder.parent} ({problem}); "
            "free some space there, or point SECURA_CACHE at another folder"
        ) from problem
    return DeltaImage.open(folder)


def _encode(D: Tensor, dtype: str) -> tuple[Tensor, Tensor]:
    if dtype == "int8":
        return quantise_rows(D)
    return D.contiguous(), torch.ones(len(D))


def _write(file: BinaryIO, tensor: Tensor) -> None:
    file.write(tensor.contiguous().view(torch.uint8).numpy().data)


def _digest(file: Path) -> str:
    state = blake3(max_threads=blake3.AUTO)
    with file.open("rb") as source:
        while block := source.read(2**24):
            state.update(block)
    return str(state.hexdigest())


def _header(shapes: Mapping[str, tuple[int, int]], dtype: str) -> bytes:
    at, header = 0, {}
    for module, (out, inner) in shapes.items():
        for name, code, shape, size in (
            (f"{module}.weight", _CODES[dtype], [out, inner], out * inner * DTYPES[dtype].itemsize),
            (f"{module}.scale", "F32", [out], 4 * out),
        ):
            header[name] = {"dtype": code, "shape": shape, "data_offsets": [at, at + size]}
            at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 64)
    return struct.pack("<Q", len(text)) + text


@dataclass(frozen=True)
class DeltaImage:
    """The updates of one adapter, on the disk."""

    folder: Path
    dtype: str
    modules: tuple[str, ...]
    size: int
    """Bytes of the weights' file."""
    digest: str
    """BLAKE3 of that file."""
    error: float
    """‖D̂ − D‖ / ‖D‖ over all modules, D̂ being what is kept."""

    @classmethod
    def open(cls, folder: Path) -> DeltaImage:
        """Return the image in a folder.

        Raises:
            StorageError: there is none, or it is not whole.
        """
        try:
            if not (folder / _FACTS).is_file():
                # Reading a pipe would wait, or never end.
                raise ValueError(f"there is no file {_FACTS}")
            facts = json.loads((folder / _FACTS).read_text())
            if facts["format"] != _FORMAT:
                raise ValueError(f"it has format {facts['format']}, expected {_FORMAT}")
            image = cls(
                folder,
                facts["dtype"],
                tuple(facts["modules"]),
                facts["size"],
                facts["digest"],
                facts["error"],
            )
            actual = (folder / _WEIGHTS).stat().st_size
            if not image.modules or image.dtype not in DTYPES:
                raise ValueError(f"{_FACTS} is damaged")
            if actual != image.size:
                raise ValueError(f"{_WEIGHTS} has {actual} bytes, expected {image.size}")
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise StorageError(f"{folder} holds no usable delta image: {error}") from error
        return image

    def stamp(self) -> tuple[int, int, int]:
        """Return inode, size and change time of the weights' file. Raises OSError."""
        stat = (self.folder / _WEIGHTS).stat()
        return stat.st_ino, stat.st_size, stat.st_ctime_ns

    def check(self) -> None:
        """Raise StorageError unless the weights are the bytes that were written."""
        try:
            same = _digest(self.folder / _WEIGHTS) == self.digest
        except OSError as error:
            raise StorageError(f"{self.folder} cannot be read: {error}") from error
        if not same:
            raise StorageError(f"{self.folder} holds no usable delta image: its bytes have changed")

    def read(self, modules: Sequence[str]) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Yield module, weight ``(out, in)`` and scale ``(out,)`` of some modules.

        Raises:
            StorageError: the file cannot be read.
        """
        file, dtype = self.folder / _WEIGHTS, DTYPES[self.dtype]
        try:
            stored = {tensor.name: tensor for tensor in read_shard(file).tensors}
            # Not a mapping: of a file that shrinks meanwhile it would end the process.
            with opened(file) as fd:
                for module in modules:
                    weight = read_tensor(fd, stored[f"{module}.weight"], dtype=dtype)
                    yield module, weight, read_tensor(fd, stored[f"{module}.scale"])
        except (OSError, ValueError, LookupError, struct.error) as error:
            raise StorageError(f"{self.folder} cannot be read: {error}") from error
