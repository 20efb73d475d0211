"""A checkpoint folder that appears whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from tqdm import tqdm

from secura_serve.adapter import put_in_place
from secura_serve.errors import MergeError

__all__ = ["carry", "new_folder", "progress", "save_text"]


@contextmanager
def new_folder(out: Path, *, replace: bool = False) -> Iterator[Path]:
    """A hidden work folder beside ``out`` that takes its name when the block ends well.

    What a killed run left behind is removed by the next one for the same name. With ``replace``
    the folder takes the place of an existing ``out``, which is whole until then.

    Raises:
        MergeError: another process is writing to ``out``, or the disk is full or fails.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        # The kernel drops this lock when its holder dies, so a killed merge blocks nobody.
        lock = out.parent / f".{out.name}.lock"
        with FileLock(lock, timeout=0):
            try:
                yield from _filled(out, replace)
            finally:
                lock.unlink(missing_ok=True)
    except Timeout as error:
        raise MergeError(f"another merge is writing to {out}: wait for it") from error
    except OSError as error:
        raise MergeError(
            f"{out} was not written ({error}); nothing was left behind. Check the free space and "
            "the health of the disks, then run it again"
        ) from error


def _filled(out: Path, replace: bool) -> Iterator[Path]:
    for stale in out.parent.glob(f".{out.name}.*.partial"):
        shutil.rmtree(stale, ignore_errors=True)
    holder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    try:
        work = holder / "new"
        work.mkdir()
        yield work
        _sync(work)
        if replace:
            put_in_place(work, out, holder / "old")
        else:
            work.rename(out)
        # It is there and whole; only its name might not outlive a power cut.
        with suppress(OSError):
            _sync(out.parent)
    finally:
        shutil.rmtree(holder, ignore_errors=True)


def _sync(path: Path) -> None:
    """fsync a file or a folder's entries."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def progress(total: int, what: str) -> Any:
    """A bar with bytes/s on a terminal; silent elsewhere."""
    return tqdm(total=total, desc=what, unit="B", unit_scale=True, unit_divisor=1024, disable=None)


def save_text(file: Path, text: str) -> None:
    """Write and fsync."""
    file.write_text(text, encoding="utf-8")
    _sync(file)


def carry(source: Path, names: tuple[str, ...], work: Path, dtype: torch.dtype | None) -> None:
    """Copy the extra files; config.json comes last, since it makes a folder a checkpoint.

    A new ``dtype`` goes into config.json under the key that is already there.
    """
    for name in names:
        if name != "config.json":
            shutil.copyfile(source / name, work / name)
            _sync(work / name)
    config = (source / "config.json").read_text(encoding="utf-8")
    if dtype is not None:
        values = json.loads(config)
        key = "torch_dtype" if "torch_dtype" in values else "dtype"
        values[key] = str(dtype).removeprefix("torch.")
        config = json.dumps(values, indent=2) + "\n"
    save_text(work / "config.json", config)
