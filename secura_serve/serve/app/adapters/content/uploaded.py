"""The folder of an uploaded adapter: which files it may have, writing it, and removing it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from filelock import Timeout

from secura_serve.adapter.format import CONFIG_NAME, WEIGHTS_NAME
from secura_serve.errors import LifecycleError, StorageError
from secura_serve.system.atomic import atomic_folder, only_writer

__all__ = ["UPLOADED", "check_uploaded", "remove_folder", "write_folder"]

UPLOADED = (CONFIG_NAME, WEIGHTS_NAME, "README.md", "train.json")
"""The files that an upload may hold; the first two it must."""


def check_uploaded(files: Mapping[str, bytes]) -> None:
    """Raise LifecycleError (400) for files that are missing or that are not :data:`UPLOADED`."""
    missing = [file for file in UPLOADED[:2] if file not in files]
    unknown = sorted(set(files) - set(UPLOADED))
    if missing or unknown:
        raise LifecycleError(
            400,
            "an upload holds the files "
            f"{UPLOADED[0]} and {UPLOADED[1]} ({' and '.join(UPLOADED[2:])} if you like); "
            + "; ".join(
                [f"{file} is missing" for file in missing]
                + [f"{file[:80]!r} is not one of them" for file in unknown]
            ),
        )


def remove_folder(folder: Path) -> None:
    """Remove a folder in one step as seen by others, or a link to one; a missing one is fine.

    Raises:
        StorageError: it cannot be removed.
    """
    try:
        if folder.is_symlink():
            folder.unlink()
        elif folder.is_dir():
            hidden = Path(tempfile.mkdtemp(prefix=f".{folder.name}.removed-", dir=folder.parent))
            folder.rename(hidden / folder.name)
            shutil.rmtree(hidden, ignore_errors=True)
    except OSError as error:
        raise StorageError(f"{folder} cannot be removed ({error}); it is still served") from error


def write_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """Put a folder with these files in the place of what is there, in one step.

    Raises:
        LifecycleError: (409) another process is writing it.
        StorageError: the disk is full or cannot be written.
    """
    try:
        # The lock also clears what a killed writer left.
        with only_writer(folder, wait=False), atomic_folder(folder) as new:
            # The config makes a folder an adapter, so it is written last.
            for name in reversed(UPLOADED):
                if name in files:
                    (new / name).write_bytes(files[name])
    except Timeout as error:
        raise LifecycleError(409, f"{folder.name} is being written by another process") from error
    except OSError as error:
        raise StorageError(
            f"{folder} cannot be written ({error}); free some space there, or make it writable for "
            "the server"
        ) from error
