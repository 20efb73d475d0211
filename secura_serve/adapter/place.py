"""Giving a finished folder its name."""

from __future__ import annotations

import ctypes
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from secura_serve.errors import ConfigError

__all__ = ["check_target", "put_in_place", "replacing"]


def check_target(target: Path, overwrite: bool, *marks: str) -> None:
    """Refuse a folder before the work for it begins, not after.

    Args:
        marks: files of which a folder of this kind holds one.

    Raises:
        ConfigError: it exists and ``overwrite`` is off; it holds something else than a folder of
            this kind does; nothing can be written there.
    """
    target = target.absolute()
    if os.path.lexists(target):
        if not overwrite:
            raise ConfigError(f"{target} exists; choose another --out or give --overwrite")
        ours = target.is_dir() and any((target / mark).is_file() for mark in marks)
        if not ours and not (target.is_dir() and not any(target.iterdir())):
            raise ConfigError(
                f"{target} holds none of {', '.join(marks)}, so it is not replaced: choose another "
                "--out, or remove it yourself"
            )
    above = next(parent for parent in target.parents if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=above):
            pass
    except OSError as error:
        raise ConfigError(
            f"{target} cannot be written ({above}: {error.strerror}); choose another --out"
        ) from error


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
