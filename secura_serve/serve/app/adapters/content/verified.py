"""What earlier starts have verified, so that unchanged files are not read again.

One JSON file for each base: which folder had which content when its files had these inodes, sizes
and change times, and which contents were found to belong to the base. Losing it costs time alone.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

from secura_serve.system.atomic import write_whole

__all__ = ["Stamps", "Verified"]

Stamps = tuple[tuple[int, int, int], ...]
"""Inode, size and change time (ns) of each file."""

_FORMAT = 1
# A file that changes twice within a tick of the clock keeps its stamp, so that what was written
# just before it was read is not remembered.
_SETTLED_NS = 2_000_000_000


class Verified:
    """Memory of one base's verified adapters.

    Args:
        folder: where the file is kept; None remembers until the process ends.
        base: the base's folder. Where its weights have changed, nothing is remembered of them.
    """

    def __init__(self, folder: Path | None, base: Path) -> None:
        self._lock = threading.Lock()
        self._base = [[f.name, *_facts(f)] for f in sorted(base.glob("*.safetensors"))]
        self._file = None
        if folder is not None:
            self._file = folder / f"{sha256(str(base.resolve()).encode()).hexdigest()[:32]}.json"
        raw = self._read()
        self._digests: dict[str, tuple[Stamps, str]] = raw.get("digests", {})
        self.identities: dict[str, str] = raw.get("identities", {})
        """Digest of a content that belongs to this base -> its ``base_id``."""
        self.norm_bounds: dict[str, Mapping[str, float]] = raw.get("norm_bounds", {})
        """``base_id`` -> module -> bound of the update's norm."""
        self._changed = False

    def digest(self, folder: Path, stamps: Stamps) -> str | None:
        """Return the digest of a folder's files, if they still have the stamps that they had."""
        known = self._digests.get(str(folder))
        return known[1] if known is not None and known[0] == stamps else None

    def remember_digest(self, folder: Path, stamps: Stamps, digest: str) -> None:
        """Take note of what a folder holds."""
        if max(changed for _, _, changed in stamps) < time.time_ns() - _SETTLED_NS:
            with self._lock:
                self._digests[str(folder)] = (stamps, digest)
                self._changed = True

    def remember(self, digest: str, identity: str, norm_bounds: Mapping[str, float]) -> None:
        """Take note that a content belongs to this base."""
        with self._lock:
            self.identities[digest] = identity
            self.norm_bounds[identity] = dict(norm_bounds)
            self._changed = True

    def forget(self, folder: Path, digest: str) -> None:
        """Take note that a folder with this content is gone."""
        with self._lock:
            self._digests.pop(str(folder), None)
            self.identities.pop(digest, None)

    def save(self) -> None:
        """Write the file, atomically; failing to do so costs the next start time alone."""
        if self._file is None or not self._changed:
            return
        with self._lock:
            text = json.dumps(
                {
                    "format": _FORMAT,
                    "base": self._base,
                    "digests": {k: v for k, v in self._digests.items() if os.path.isdir(k)},
                    "identities": self.identities,
                    "norm_bounds": self.norm_bounds,
                }
            )
            self._changed = False
        with suppress(OSError):
            write_whole(self._file, text, durable=False)

    def _read(self) -> dict[str, Any]:
        try:
            raw = json.loads(self._file.read_text()) if self._file else {}
            if raw.get("format") != _FORMAT or raw["base"] != self._base:
                return {}
            digests = {
                folder: (tuple((int(i), int(s), int(c)) for i, s, c in stamps), str(digest))
                for folder, (stamps, digest) in raw["digests"].items()
            }
            identities = {str(k): str(v) for k, v in raw["identities"].items()}
            bounds = {
                identity: {module: float(bound) for module, bound in modules.items()}
                for identity, modules in raw["norm_bounds"].items()
            }
            return {"digests": digests, "identities": identities, "norm_bounds": bounds}
        except (OSError, ArithmeticError, LookupError, RuntimeError):
            return {}
        except (ValueError, TypeError, AttributeError):
            return {}


def _facts(file: Path) -> tuple[int, int, int]:
    try:
        stat = file.stat()
    except OSError:
        return 0, 0, 0
    return stat.st_ino, stat.st_size, stat.st_mtime_ns
