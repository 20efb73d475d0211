"""Verified content becomes what a name stands for, and the decision outlives a restart."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable

from secura_serve.errors import LifecycleError, StorageError, UnservableError
from secura_serve.serve.app.adapters.content.card import read_card
from secura_serve.serve.app.adapters.content.snapshots import Snapshot
from secura_serve.serve.app.adapters.content.verifier import Entry, Verifier
from secura_serve.serve.app.adapters.library import Library, Origin, Version
from secura_serve.serve.app.adapters.residency import Residency
from secura_serve.serve.app.adapters.retirement import Retirement
from secura_serve.serve.app.adapters.state import StateFile

__all__ = ["Publisher"]


class Publisher:
    """Makes versions and lets names stand for them. Whoever calls it holds the name's lock.

    Args:
        next_number: gives each content its number in the engine.
        state: where decisions outlive a restart; None forgets them.
        say: tells the operator one line.
    """

    def __init__(
        self,
        library: Library,
        verifier: Verifier,
        residency: Residency,
        retirement: Retirement,
        next_number: Callable[[], int],
        state: StateFile | None,
        say: Callable[[str], None],
    ) -> None:
        self._library, self._verifier, self._state = library, verifier, state
        self._residency, self._retirement = residency, retirement
        self._next_number, self._say = next_number, say
        self._saving = asyncio.Lock()

    def make_version(
        self, snapshot: Snapshot, *, origin: Origin, created: float, entry: Entry | None = None
    ) -> Version:
        """Return a version of a copy in the store, checked. Raises SecuraError."""
        entry = entry or self._verifier.examine_copy(snapshot)
        image = self._residency.image_folder(entry)
        if entry.fine_tune is not None and image is None:
            raise UnservableError(
                f"{entry.name} is a whole fine-tune, and this server has no place for the linears "
                "that it changes: restart it with the folder there, and with --resident above 0"
            )
        # Requests may still run on the same content, and the engine must not have it under two
        # numbers: it tells adapters apart by name in one place and by number in another.
        number = self._retirement.number(snapshot.path) or self._next_number()
        card = read_card(snapshot.source) | {"lora_size": self._verifier.lora_size(entry)}
        return Version(entry, number, origin, created, card, image)

    async def publish(self, entry: Entry, origin: Origin) -> Version:
        """Make verified content what its name stands for."""
        await self._residency.prepare(entry)
        assert entry.snapshot is not None
        record = self._library.records.get(entry.name)
        before = record.serving if record else None
        version = self.make_version(entry.snapshot, origin=origin, created=time.time(), entry=entry)
        retired = self._library.add(version)
        record = self._library.record(entry.name)
        now = record.serving
        assert now is not None
        workers = self._residency.workers
        if workers is not None and now.image is None:
            workers.mark_prepared(now)
            if not self._retirement.is_in_use(entry.name, entry.snapshot.path):
                # The same content was there already, at a path of its own.
                await workers.drop(entry.snapshot.path)
        changed = before is None or before.digest != now.digest
        if changed:
            await self.move_pin(entry.name, [*record.versions, *retired])
        self._retirement.retire(retired)
        await self.save()
        if changed:
            self._say(f"{now.name} is served as {now}" + (f", after {before}" if before else ""))
        return now

    async def move_pin(self, name: str, versions: Iterable[Version]) -> None:
        """Have a pin follow the name; ``versions`` are all that may have it."""
        record = self._library.record(name)
        if not record.pinned or self._residency.workers is None or record.serving is None:
            return
        for version in versions:
            if version is not record.serving:
                await self._residency.pin(version, False)
        try:
            await self._residency.pin(record.serving, True)
        except LifecycleError as error:
            self._say(f"{name} is not pinned any more: {error}")
            record.pinned = False

    async def save(self) -> None:
        """Write what was decided; the operator is told where that fails."""
        if self._state is not None:
            async with self._saving:
                try:
                    # As it is now: a thread must not read what this one changes.
                    await asyncio.to_thread(self._state.save, self._state.encode(self._library))
                except StorageError as error:
                    self._say(str(error))
