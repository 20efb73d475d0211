"""What becomes of a version that nobody can ask for any more: requests that run still use it."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path

from secura_serve.serve.app.adapters.content.snapshots import Snapshot, SnapshotStore
from secura_serve.serve.app.adapters.library import Library, Record, Version
from secura_serve.serve.app.adapters.mixes.mixes import Mixes
from secura_serve.serve.app.adapters.residency import Residency

__all__ = ["Retirement"]


class Retirement:
    """Takes versions from the engine and the disk once all requests that ran have ended.

    Args:
        library: what names stand for.
        residency: what the engine holds.
        mixes: forget the mixes that a version is a part of.
        store: holds the copies; None if there is none.
        locks: by adapter name, held while its versions change.
        ended: returns once every request that runs now has ended.
    """

    def __init__(
        self,
        library: Library,
        residency: Residency,
        mixes: Mixes,
        store: SnapshotStore | None,
        locks: Mapping[str, asyncio.Lock],
        ended: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self._library, self._residency, self._mixes = library, residency, mixes
        self._store, self._locks = store, locks
        self.ended = ended
        self.running: set[asyncio.Task[None]] = set()
        """What waits for requests to end."""
        self.copies: Counter[Path] = Counter()
        """Copies of versions that nobody can ask for any more, while requests may still run."""
        self._numbers: dict[Path, int] = {}

    def number(self, path: Path) -> int | None:
        """Return by what number the engine still knows a retired copy, if it does."""
        return self._numbers.get(path)

    def is_in_use(self, name: str, path: Path) -> bool:
        """Return whether a version is, or requests may still run, on a copy."""
        record = self._library.records.get(name, Record())
        return self.copies[path] > 0 or path in {v.snapshot.path for v in record.versions}

    async def drop(self, name: str, copy: Snapshot) -> None:
        """Forget a copy that became no version, unless one has the same content."""
        if self.is_in_use(name, copy.path):
            return
        if self._residency.workers is not None:
            await self._residency.workers.drop(copy.path)
        if self._store is not None:
            await asyncio.to_thread(self._store.discard, copy)

    def retire(self, versions: Sequence[Version]) -> None:
        """Free versions once the requests that run now have ended."""
        if versions:
            self._mixes.drop(versions)
            self.copies.update(version.snapshot.path for version in versions)
            self._numbers.update((v.snapshot.path, v.number) for v in versions)
            task = asyncio.ensure_future(self._free(versions))
            self.running.add(task)
            task.add_done_callback(self.running.discard)

    async def _free(self, versions: Sequence[Version]) -> None:
        if self.ended is not None:
            await self.ended()
        for version in versions:
            # The same content may have come back meanwhile, and may even have gone again: it has
            # the same copy.
            async with self._locks[version.name]:
                path = version.snapshot.path
                self.copies[path] -= 1
                again = self.is_in_use(version.name, path)
                if not self.copies[path]:
                    del self.copies[path], self._numbers[path]
                if again:
                    continue
                await self._residency.forget(version)
                if self._store is not None:
                    await asyncio.to_thread(self._store.discard, version.snapshot)
