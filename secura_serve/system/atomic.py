"""Folders that appear whole or not at all, whatever is killed or full meanwhile."""

from __future__ import annotations

import ctypes
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from secura_serve.errors import ConfigError
from secura_serve.system.os_errors import reason

__all__ = [
    "atomic_folder",
    "check_target",
    "only_writer",
    "place_problem",
    "put_in_place",
    "sync",
    "write_whole",
]


def check_target(target: Path, overwrite: bool, *marks: str) -> None:
    """Refuse an output folder before the work for it begins, not after.

    Args:
        marks: files of which a folder of this kind holds at least one.

    Raises:
        ConfigError: it exists and ``overwrite`` is off; it is not a folder of this kind; nothing
            can be written there.
    """
    target = target.absolute()
    if os.path.lexists(target):
        if not overwrite:
            raise ConfigError(f"{target} exists; choose another --out or give --overwrite")
        try:
            ours = target.is_dir() and any((target / mark).is_file() for mark in marks)
            empty = target.is_dir() and not any(target.iterdir())
        except OSError as error:
            raise ConfigError(
                f"{target} cannot be looked into: {reason(error)}; choose another --out"
            ) from error
        if not ours and not empty:
            raise ConfigError(
                f"{target} holds none of {', '.join(marks)}, so it is not replaced: choose another "
                "--out, or remove it yourself"
            )
    if problem := place_problem(target):
        raise ConfigError(f"{problem}; choose another --out")


def place_problem(target: Path) -> str | None:
    """Return why nothing can be written at ``target``, or None; what is there does not count."""
    # Not Path.exists(), which raises in a folder that is closed to us; nor os.path.exists(), for
    # which a link that leads nowhere is not there.
    parents = target.absolute().parents
    above = next((parent for parent in parents if os.path.lexists(parent)), None)
    if above is None:
        return f"{target} is the root of the file system"
    try:
        with tempfile.TemporaryFile(dir=above):
            return None
    except OSError as error:
        return f"{target} cannot be written ({above}: {reason(error)})"


@contextmanager
def atomic_folder(target: Path, *, replace: bool = True) -> Iterator[Path]:
    """Yield an empty hidden folder that takes the name ``target`` when the block ends well.

    Its files are on the disk by then. A killed process, a full disk or an exception leaves the
    old folder, or none; of a killed process a hidden ``.NAME.*.partial`` stays behind.

    Args:
        replace: take the place of an existing folder; else that is an OSError.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    try:
        new = work / "new"
        new.mkdir()
        yield new
        for file in new.rglob("*"):
            sync(file)
        sync(new)
        if replace:
            put_in_place(new, target, work / "old")
        else:
            new.rename(target)
        # It is there and whole; only its name might not outlive a power cut.
        with suppress(OSError):
            sync(target.parent)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def write_whole(target: Path, content: str | bytes, *, durable: bool = True) -> None:
    """Write a small file to a draft that then takes its name; its folder is made if need be.

    Args:
        durable: have it on the disk before it takes its name (fsync).

    Raises:
        OSError: it cannot be written; an old one stays, and no draft.
    """
    target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    handle, draft = tempfile.mkstemp(dir=target.parent, prefix=".")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content.encode("utf-8") if isinstance(content, str) else content)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(draft, target)
    except OSError:
        with suppress(OSError):
            os.unlink(draft)
        raise


@contextmanager
def only_writer(target: Path, *, wait: bool) -> Iterator[None]:
    """Keep other processes from writing ``target``, and remove what killed ones left behind.

    Args:
        wait: for a process that is writing it; else that is ``filelock.Timeout`` at once.
    """
    # Only who writes needs it: `import secura_serve` must stay instant.
    from filelock import FileLock

    target.parent.mkdir(parents=True, exist_ok=True)
    # The kernel drops this lock when its holder dies, so a killed writer blocks nobody.
    lock = target.parent / f".{target.name}.lock"
    with FileLock(lock, timeout=-1 if wait else 0):
        for stale in target.parent.glob(f".{target.name}.*.partial"):
            shutil.rmtree(stale, ignore_errors=True)
        try:
            yield
        finally:
            # Somebody who waits has the file open: unlinked, it would lock nothing any more.
            if not wait:
                lock.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Put a file, or the entries of a folder, on the disk (fsync)."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def put_in_place(new: Path, target: Path, aside: Path) -> None:
    """Rename ``new`` to ``target``; an old ``target`` ends up as ``new`` or ``aside``.

    All three lie on one file system. A failure leaves the old folder where it was.

    Raises:
        OSError: the renaming failed.
    """
    # A link that leads nowhere is there, too.
    if not os.path.lexists(target):
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
