"""What outlives a restart: versions, rollbacks, pins and aliases, in one small file.

The file names contents by digest; the contents themselves are the copies of the snapshot store. It
is written whole, to a draft that then takes its name, after every change.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

from secura_serve.errors import SecuraError, StorageError
from secura_serve.serve.app.adapters.content.snapshots import SnapshotStore
from secura_serve.serve.app.adapters.library import Library, Origin, Record, Version
from secura_serve.system.atomic import write_whole

__all__ = ["StateFile"]

_FORMAT = 1


class StateFile:
    """The file of one server, or of several that serve the same folder on one machine in turn.

    Args:
        path: of the file; its folder is made on the first write.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @staticmethod
    def encode(library: Library) -> str:
        """Return what is to outlive a restart, as JSON."""
        records = {
            name: {
                "versions": [
                    {"digest": v.digest, "origin": v.origin, "created": v.created}
                    for v in record.versions
                ],
                "on_disk": record.on_disk,
                "rolled_back_to": record.rolled_back_to,
                "pinned": record.pinned,
            }
            for name, record in library.records.items()
            if record.versions
        }
        return json.dumps({"format": _FORMAT, "adapters": records, "aliases": library.aliases})

    def save(self, text: str) -> None:
        """Write what :meth:`encode` gave.

        Raises:
            StorageError: the file cannot be written; the old one stays.
        """
        try:
            write_whole(self.path, text + "\n")
        except OSError as error:
            raise StorageError(
                f"the state of the adapters cannot be written to {self.path} ({error}); free some "
                "space there, or name another file with --state"
            ) from error

    def aliases(self) -> dict[str, str]:
        """Return the aliases that an earlier run kept; none where the file cannot be read."""
        try:
            return dict(json.loads(self.path.read_text(encoding="utf-8"))["aliases"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return {}

    def restore(
        self, library: Library, store: SnapshotStore, make: Callable[..., Version]
    ) -> list[str]:
        """Bring back what an earlier run decided about the adapters.

        What the folder holds now wins where it is new; a pushed version that is newer than the
        folder's content stays the newest.

        Args:
            library: holds the versions that the folder has now.
            make: snapshot, ``origin=``, ``created=`` -> the version, checked.

        Returns:
            What could not be brought back, a sentence each.
        """
        try:
            raw = json.loads(self.path.read_text(encoding="utf-8"))
            adapters, aliases = dict(raw["adapters"]), dict(raw["aliases"])
            if raw["format"] != _FORMAT:
                raise ValueError(f"format {raw['format']}")
        except FileNotFoundError:
            return []
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            return [f"{self.path} cannot be read and is not used: {error}"]
        lost = []
        for name, saved in adapters.items():
            try:
                lost += _restore(library, store, make, str(name), saved)
            except (KeyError, TypeError, ValueError, AttributeError, OSError) as error:
                lost.append(f"{name}: what {self.path} says cannot be read: {error!r}")
        for alias, target in aliases.items():
            try:
                library.set_alias(str(alias), str(target))
            except SecuraError as error:
                lost.append(f"alias {alias}: {error}")
        for name in adapters:
            # Only now is it known which old versions an alias stands for.
            library.drop_old(str(name))
        return lost


def _restore(
    library: Library,
    store: SnapshotStore,
    make: Callable[..., Version],
    name: str,
    saved: dict[str, Any],
) -> list[str]:
    record = library.records.get(name, Record())
    now = {version.digest: version for version in record.versions}
    on_disk = record.on_disk
    # An adapter that came from a folder which is gone goes with it; one that was pushed stays, and
    # so do the good versions of a folder whose content is refused by now.
    if on_disk is None and saved["on_disk"] is not None:
        if record.refused is None:
            return []
        on_disk = str(saved["on_disk"])
    lost, versions = [], list[Version]()
    for entry in saved["versions"]:
        digest = str(entry["digest"])
        if (version := now.get(digest)) is None:
            try:
                if (snapshot := store.find(name, digest)) is None:
                    raise SecuraError("its copy is gone")
                library.check_free(name)
                version = make(snapshot, origin=_origin(entry), created=_created(entry))
            except SecuraError as error:
                lost.append(f"{name}@{digest[:12]} is not served any more: {error}")
                continue
        versions.append(version)
    known = {version.digest for version in versions}
    if record.on_disk not in (None, saved["on_disk"]):
        # The folder has new content, which ends a rollback.
        record.versions = [*record.versions, *(v for v in versions if v.digest not in now)]
    elif versions:
        # The folder's content may be one that newer versions have pushed out.
        record.versions = [*versions, *(v for v in record.versions if v.digest not in known)]
        wanted = saved["rolled_back_to"]
        record.rolled_back_to = wanted if wanted in known else None
    record.pinned = bool(saved["pinned"])
    if record.versions:
        record.on_disk = on_disk
        library.records[name] = record
        library.changed(name)
    return lost


def _origin(entry: dict[str, Any]) -> Origin:
    if entry["origin"] not in get_args(Origin):
        raise ValueError(f"origin {entry['origin']!r:.80}")
    origin: Origin = entry["origin"]
    return origin


def _created(entry: dict[str, Any]) -> float:
    created = entry["created"]
    # Not isfinite: an integer may be too large for a float. A file's time may be before 1970.
    if not isinstance(created, (int, float)) or not -(2**53) < created < 2**53:
        raise ValueError(f"created {created!r:.80}")
    return float(created)
