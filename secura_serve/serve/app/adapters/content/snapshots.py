"""Copies of the adapters as they were verified, so that what was checked is what is served.

Files in the adapters folder can be replaced, damaged or deleted while the server runs. So each
adapter is copied once, checked in its copy, and served from there::

    <root>/<BLAKE3 of both files>/<name>/adapter_config.json, adapter_model.safetensors

The digest in the path is also what keeps vLLM's prefix cache apart: it hashes an adapter's name
and path, so that the same name with other content never shares a block. Copies are kept for the
next start, and shared by servers; those that no start used for :data:`KEPT_DAYS` days are removed.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from secura_serve.adapter.format import CONFIG_NAME, WEIGHTS_NAME
from secura_serve.errors import AdapterFormatError, StorageError
from secura_serve.serve.app.adapters.content.verified import Stamps, Verified

__all__ = [
    "KEPT_DAYS",
    "Snapshot",
    "SnapshotStore",
    "digest_of",
    "files_of",
    "placed_files",
    "stamps_of",
]

KEPT_DAYS = 30
_FILES = (CONFIG_NAME, WEIGHTS_NAME)
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_CHUNK = 2**22
_DIGEST_LENGTH = 32


@dataclass(frozen=True)
class Snapshot:
    """One adapter as it was when it was copied."""

    path: Path
    """The copy; its last part is the adapter's name."""
    source: Path
    """The folder that it was copied from; of what came otherwise, the copy itself."""
    digest: str
    """32 hex digits of BLAKE3 over both files."""
    stamps: Stamps
    """Those of the source's files when they were copied."""

    def has_changed(self) -> bool:
        """Return whether the source no longer holds the content of this copy."""
        try:
            return stamps_of(self.source) != self.stamps and digest_of(self.source) != self.digest
        except OSError:
            return True


class SnapshotStore:
    """All copies below one folder.

    Args:
        root: made on first use, readable by this user alone.
        verified: remembers digests, so that unchanged files are not read again.
        private: where this server alone keeps what came without a folder, and may remove it again;
            other servers share ``root``. By default the same.
    """

    def __init__(
        self, root: Path, verified: Verified | None = None, private: Path | None = None
    ) -> None:
        self.root, self.verified, self.private = root, verified, private or root

    def take(self, source: Path) -> Snapshot:
        """Copy an adapter folder, unless an identical copy is there already.

        Raises:
            AdapterFormatError: a file cannot be read.
            StorageError: the copy cannot be written.
        """
        try:
            stamps, digest = self.known(source)
        except OSError as error:
            raise AdapterFormatError(f"{source.name} cannot be read: {error}") from error
        with self._storing(source.name):
            if not self._has(self.root, digest, source.name):
                digest = self._write(
                    self.root, source.name, lambda new: digest_of(source, copy_to=new)
                )
            copy = self.root / digest / source.name
            os.utime(copy.parent)
        return Snapshot(copy, source, digest, stamps)

    def put(self, name: str, config: bytes, weights: bytes) -> Snapshot:
        """Keep an adapter that came without a folder.

        Raises:
            StorageError: the copy cannot be written.
        """

        def write(new: Path) -> str:
            for file, content in zip(_FILES, (config, weights), strict=True):
                (new / file).write_bytes(content)
            return digest_of(new)

        with self._storing(name):
            path = self.private / self._write(self.private, name, write) / name
            return Snapshot(path, path, path.parent.name, stamps_of(path))

    def find(self, name: str, digest: str) -> Snapshot | None:
        """Return a copy that was kept earlier; None where it is gone or damaged."""
        for root in (self.root, self.private):
            if self._has(root, digest, name):
                path = root / digest / name
                with suppress(OSError):
                    os.utime(path.parent)
                return Snapshot(path, path, digest, stamps_of(path))
        return None

    def discard(self, snapshot: Snapshot) -> None:
        """Remove a copy made by :meth:`put` that nothing needs any more."""
        if snapshot.path.parent.parent != self.private:
            return
        shutil.rmtree(snapshot.path, ignore_errors=True)
        with suppress(OSError):
            snapshot.path.parent.rmdir()
        if self.verified is not None:
            self.verified.forget(snapshot.path, snapshot.digest)

    @contextmanager
    def _storing(self, name: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StorageError(
                f"no copy of the adapter {name} can be kept in {self.root} ({error}); free some "
                "space there, or point SECURA_CACHE at another folder"
            ) from error

    def known(self, folder: Path) -> tuple[Stamps, str]:
        """Return stamps and digest of a folder; it is read only if its files have changed."""
        stamps = stamps_of(folder)
        digest = self.verified.digest(folder, stamps) if self.verified else None
        if digest is None:
            digest = digest_of(folder)
            if self.verified is not None:
                self.verified.remember_digest(folder, stamps, digest)
        return stamps, digest

    def _has(self, root: Path, digest: str, name: str) -> bool:
        try:
            return self.known(root / digest / name)[1] == digest
        except OSError:
            return False

    def _write(self, root: Path, name: str, write: Callable[[Path], str]) -> str:
        """Have ``write`` fill a folder and return its digest, then give it its place."""
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
        draft = Path(tempfile.mkdtemp(prefix=".", dir=root))
        try:
            new = draft / name
            new.mkdir(mode=0o700)
            digest = write(new)
            if self._has(root, digest, name):
                return digest
            target = root / digest / name
            target.parent.mkdir(exist_ok=True, mode=0o700)
            with suppress(FileNotFoundError):
                # Only a damaged copy can stand there.
                target.rename(draft / "replaced")
            new.rename(target)
            return digest
        finally:
            shutil.rmtree(draft, ignore_errors=True)

    def remove_unused(self, days: float = KEPT_DAYS) -> None:
        """Remove copies that no server has used for ``days``, and what killed processes left."""
        oldest = time.time() - days * 86400
        for entry in (*self.root.glob("*"), *self.private.glob("*")):
            with suppress(OSError):
                if entry.stat().st_mtime < oldest:
                    shutil.rmtree(entry, ignore_errors=True)


def files_of(folder: Path) -> tuple[str, ...]:
    """Return the names of the files that are an adapter, or those of a whole fine-tune."""
    if (folder / CONFIG_NAME).exists() or not (folder / "config.json").is_file():
        return _FILES
    if os.path.lexists(folder / _SINGLE):
        return "config.json", _SINGLE
    if not (folder / _INDEX).is_file():
        return _FILES
    return "config.json", _INDEX, *_indexed(folder / _INDEX)


def _indexed(index: Path) -> list[str]:
    """Return the files that an index names; what is no name of a file beside it is left out, as
    reading the checkpoint will refuse it."""
    try:
        shards = {str(s) for s in json.loads(index.read_text("utf-8"))["weight_map"].values()}
        return sorted(s for s in shards if Path(s).name == s and s.isprintable())
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return []


def stamps_of(folder: Path) -> Stamps:
    """Return inode, size and change time of an adapter's files. Raises OSError."""
    stats = [(folder / name).stat() for name in files_of(folder)]
    if not all(stat.S_ISREG(s.st_mode) for s in stats):
        raise OSError(f"{folder.name}: an adapter's files must be regular files")
    return tuple((s.st_ino, s.st_size, s.st_ctime_ns) for s in stats)


def placed_files(folder: Path) -> tuple[tuple[int, int], ...]:
    """Return inode and time of writing of an adapter's files: what changes when they are written,
    and not when they are read, renamed or given other rights; nothing if they cannot be seen."""
    try:
        stats = [(folder / name).stat() for name in files_of(folder)]
    except OSError:
        return ()
    return tuple((s.st_ino, s.st_mtime_ns) for s in stats)


def digest_of(folder: Path, copy_to: Path | None = None) -> str:
    """Hash each file, then the hashes: bytes cannot move from one file to the next unnoticed.

    Args:
        copy_to: where the bytes that are hashed are written as well.
    """
    # Reading a pipe or a device would wait, or never end.
    stamps_of(folder)
    whole = blake3()
    for name in files_of(folder):
        one = blake3()
        with ExitStack() as stack:
            file = stack.enter_context((folder / name).open("rb"))
            copy = stack.enter_context((copy_to / name).open("xb")) if copy_to else None
            while block := file.read(_CHUNK):
                one.update(block)
                if copy:
                    copy.write(block)
            if copy:
                copy.flush()
                os.fsync(copy.fileno())
        whole.update(one.digest())
    digest: str = whole.hexdigest()[:_DIGEST_LENGTH]
    return digest
