"""Giving a finished folder its name."""

from __future__ import annotations

import ctypes
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["put_in_place", "replacing"]


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """An empty hidden folder that becomes ``target``, replacing it, once the block has filled it.

    A killed process, a full disk or an exception leaves the old folder, or none.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        new = work / "new"
        new.mkdir()
        yield new
        for file in new.iterdir():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
        put_in_place(new, target, work / "old")
    finally:
        shutil.rmtree(work, ignore_errors=True)


def put_in_place(new: Path, target: Path, aside: Path) -> None:
    """Rename ``new`` to ``target``; an old ``target`` ends up as ``new`` or ``aside``.

    All three lie on one file system. A failure leaves the old folder where it was.

    Raises:
        OSError: the renaming failed.
    """
    if not target.exists():
        new.rename(target)
        return
    if _exchange(new, target):
        return
    target.rename(aside)
    try:
        new.rename(target)
    except OSError:
        aside.rename(target)
        raise


def _exchange(new: Path, target: Path) -> bool:
    """Swap two folders in one step (Linux renameat2), so that a kill never finds neither."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    at_fdcwd, rename_exchange = -100, 2
    paths = os.fsencode(new), os.fsencode(target)
    return bool(
        renameat2 and renameat2(at_fdcwd, paths[0], at_fdcwd, paths[1], rename_exchange) == 0
    )
