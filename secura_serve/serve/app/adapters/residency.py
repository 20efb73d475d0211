"""Where the engine holds an adapter: in a slot of its own factors, or in a place of updates."""

from __future__ import annotations

from collections.abc import Awaitable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from secura_serve.errors import UnservableError
from secura_serve.serve.app.adapters.content.verifier import Entry
from secura_serve.serve.app.adapters.library import Version
from secura_serve.serve.app.adapters.resident.slots import Occupant, ResidentSlots
from secura_serve.serve.app.adapters.workers import Workers

__all__ = ["Residency"]


class Residency:
    """CUR adapters and plain LoRAs are in slots, full-rank ones in places; this tells them apart.

    ``workers`` is set once the engine is there, ``places`` where ``--resident`` is above 0.
    """

    workers: Workers | None = None
    places: ResidentSlots | None = None

    def image_folder(self, entry: Entry) -> Path | None:
        """Return where the image of an adapter is, or will be; None if it takes no place."""
        return self.places.image_folder(entry) if self.places is not None else None

    async def prepare(self, entry: Entry) -> None:
        """Have the workers read an adapter that is chosen per request, or make its image.

        Raises:
            UnservableError: a worker cannot serve it.
            StorageError: its image cannot be written.
        """
        refused = None
        if self.workers is not None and (entry.per_request or entry.lora is not None):
            assert entry.snapshot is not None
            refused = await self.workers.prepare(entry.name, entry.snapshot.path)
        elif self.places is not None and (image := self.places.image_folder(entry)):
            assert entry.snapshot is not None
            refused = await self.places.make_image(entry.snapshot.path, image)
        if refused is not None:
            raise UnservableError(refused)

    def preparation(self, version: Version) -> Awaitable[str | None] | None:
        """Return what a request has to wait for before ``version`` may run, or None."""
        assert self.workers is not None
        if version.image is not None and self.places is not None:
            return self.places.preparation(Occupant.of(version))
        return self.workers.preparation(version)

    def admit(self, model: str, version: Version) -> AbstractContextManager[None]:
        """Return the context of a request: in it ``model`` means ``version``, which stays put."""
        if version.image is None or self.places is None:
            return nullcontext()
        return self.places.admit(model, version)

    async def pin(self, version: Version, pinned: bool) -> None:
        """Keep a version where it is, or no longer.

        Raises:
            LifecycleError: (409) there is no room for it.
        """
        if version.image is not None and self.places is not None:
            await self.places.pin(version, pinned)
        elif self.workers is not None:
            await self.workers.pin(version, pinned)

    async def forget(self, version: Version) -> None:
        """Free what a version takes in the engine."""
        if version.image is not None and self.places is not None:
            await self.places.forget(Occupant.of(version))
        elif self.workers is not None:
            await self.workers.forget(version)

    async def numbers(self) -> frozenset[int]:
        """Return the numbers of the versions that the engine holds, at most a second old."""
        slots = await self.workers.resident() if self.workers is not None else frozenset()
        return slots | frozenset(self.places.numbers if self.places is not None else ())
