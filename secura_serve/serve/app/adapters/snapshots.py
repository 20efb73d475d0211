"""Copies of the adapters as they were verified, so that what was checked is what is served.

Files in the adapters folder can be replaced, damaged or deleted while the server runs. So each
adapter is copied once, checked in its copy, and served from there::

    <root>/<BLAKE3 of both files>/<name>/adapter_config.json, adapter_model.safetensors

The digest in the path is also what keeps vLLM's prefix cache apart: it hashes an adapter's name
and path, so that the same name with other content never shares a block. Copies are kept for the
next start, and shared by servers; those that no start used for :data:`KEPT_DAYS` days are removed.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from secura_serve.adapter.format import CONFIG_NAME, WEIGHTS_NAME
from secura_serve.errors import AdapterFormatError, StorageError

__all__ = ["KEPT_DAYS", "Snapshot", "SnapshotStore"]

KEPT_DAYS = 30
_FILES = (CONFIG_NAME, WEIGHTS_NAME)
_CHUNK = 2**22
_DIGEST_LENGTH = 32


@dataclass(frozen=True)
class Snapshot:
    """One adapter as it was when it was copied."""

    path: Path
    """The copy; its last part is the adapter's name."""
    source: Path
    """The folder that it was copied from."""
    digest: str
    """32 hex digits of BLAKE3 over both files."""
    stamps: tuple[tuple[int, int, int], ...]
    """Inode, size and change time of the source's files when they were copied."""

    def has_changed(self) -> bool:
        """Return whether the source no longer holds the content of this copy."""
        try:
            return _stamps(self.source) != self.stamps and _digest_of(self.source) != self.digest
        except OSError:
            return True


class SnapshotStore:
    """All copies below one folder.

    Args:
        root: made on first use, readable by this user alone.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def take(self, source: Path) -> Snapshot:
        """Copy an adapter folder, unless an identical copy is there already.

        Raises:
            AdapterFormatError: a file cannot be read.
            StorageError: the copy cannot be written.
        """
        try:
            stamps, digest = _stamps(source), _digest_of(source)
        except OSError as error:
            raise AdapterFormatError(f"{source.name} cannot be read: {error}") from error
        try:
            if not self._has(digest, source.name):
                digest = self._write(source)
            copy = self.root / digest / source.name
            os.utime(copy.parent)
        except OSError as error:
            raise StorageError(
                f"no copy of the adapter {source.name} can be kept in {self.root} ({error}); free "
                "some space there, or point SECURA_CACHE at another folder"
            ) from error
        return Snapshot(copy, source, digest, stamps)

    def _has(self, digest: str, name: str) -> bool:
        try:
            return _digest_of(self.root / digest / name) == digest
        except OSError:
            return False

    def _write(self, source: Path) -> str:
        """Copy and hash in one pass, so that the digest is that of what was written."""
        self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
        draft = Path(tempfile.mkdtemp(prefix=".", dir=self.root))
        try:
            new = draft / source.name
            new.mkdir(mode=0o700)
            digest = _digest_of(source, copy_to=new)
            target = self.root / digest / source.name
            target.parent.mkdir(exist_ok=True, mode=0o700)
            with suppress(FileNotFoundError):
                # Only a damaged copy can stand there.
                target.rename(draft / "damaged")
            new.rename(target)
            return digest
        finally:
            shutil.rmtree(draft, ignore_errors=True)

    def remove_unused(self, days: float = KEPT_DAYS) -> None:
        """Remove copies that no start has used for ``days``, and what killed processes left."""
        oldest = time.time() - days * 86400
        for entry in self.root.glob("*"):
            with suppress(OSError):
                if entry.stat().st_mtime < oldest:
                    shutil.rmtree(entry, ignore_errors=True)


def _stamps(folder: Path) -> tuple[tuple[int, int, int], ...]:
    stats = [(folder / name).stat() for name in _FILES]
    return tuple((s.st_ino, s.st_size, s.st_ctime_ns) for s in stats)


def _digest_of(folder: Path, copy_to: Path | None = None) -> str:
    """Hash each file, then the hashes: bytes cannot move from one file to the next unnoticed."""
    whole = blake3()
    for name in _FILES:
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
