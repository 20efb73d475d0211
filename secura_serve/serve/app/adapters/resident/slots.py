"""Which adapters' updates are in a place of the engine, and the requests that hold them there.

The engine has as many places as ``--resident`` says. vLLM's scheduler does not know of them, so the
decision is made here, before a request is admitted: an update that is in no place is filled in
first, and takes the place of the one that was asked least recently, is not pinned, and that no
request uses. Where all are in use, the request waits.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secura_serve.errors import LifecycleError, SecuraError, StorageError
from secura_serve.serve.app.adapters.content.images import DeltaImages
from secura_serve.serve.app.adapters.content.verifier import Entry
from secura_serve.serve.app.adapters.library import Version
from secura_serve.serve.app.adapters.workers import Workers
from secura_serve.serve.app.observer import Observer
from secura_serve.serve.delta_image import DeltaImage

__all__ = ["ADMITTED", "Occupant", "ResidentSlots", "ResidentSpec"]

ADMITTED: ContextVar[tuple[str, Version] | None] = ContextVar("admitted", default=None)
"""Model name and version of the request that is being answered, where it holds a place. What the
name stands for may be another version by the time that vLLM looks it up."""

# Bytes that a worker copies between two steps.
_CHUNK = 2**23
_WAIT_S = 60.0


@dataclass(frozen=True)
class ResidentSpec:
    """The places of an engine, as its workers are told."""

    count: int
    dtype: str
    """``int8`` or ``float32``."""
    modules: tuple[str, ...]
    """The linears whose updates have room."""

    def to_json(self) -> dict[str, Any]:
        return {"count": self.count, "dtype": self.dtype, "modules": list(self.modules)}


@dataclass(frozen=True)
class Occupant:
    """What is, or wants to be, in a place."""

    number: int
    """What vLLM knows it by (``lora_int_id``)."""
    name: str
    image: Path
    specs: tuple[str, ...]
    """What its image is made of, see :meth:`DeltaImages.make`."""
    kept: bool = True
    """Whether its image stays on the disk when it leaves its place."""
    lasting: bool = False
    """Whether its image cannot be made again, and so is never removed here."""

    @classmethod
    def of(cls, version: Version) -> Occupant:
        """Return what stands for a version that needs a place."""
        assert version.image is not None
        specs = (str(version.snapshot.path),)
        lasting = version.entry.fine_tune is not None
        return cls(version.number, version.name, version.image, specs, lasting=lasting)


class ResidentSlots:
    """The places, and who is in them.

    Args:
        spec: how many there are, and for which linears.
        images: makes what is copied into a place.
        observer: is told how long it took to fill one.
    """

    def __init__(
        self, spec: ResidentSpec, images: DeltaImages, observer: Observer | None = None
    ) -> None:
        self.spec, self.images = spec, images
        self.workers: Workers | None = None
        self._observer = observer or Observer()
        self._modules = frozenset(spec.modules)
        self._free = list(range(spec.count))
        self._filled: OrderedDict[int, tuple[Occupant, int]] = OrderedDict()
        """Number -> who it is and the place, least recently asked first."""
        self._loading: dict[int, asyncio.Task[str | None]] = {}
        self._users: Counter[int] = Counter()
        self._waiting: Counter[int] = Counter()
        self._pinned: set[int] = set()
        self._one_at_a_time = asyncio.Lock()
        self._released = asyncio.Event()
        self._leaving: int | None = None
        """Who must leave for one that waits, and is therefore not admitted until it has."""

    def takes(self, entry: Entry) -> bool:
        """Return whether an adapter has to be, and can be, in a place to be asked per request."""
        changes = entry.adapter or entry.fine_tune
        return (
            changes is not None
            and not entry.per_request
            and self.spec.count > 0
            and changes.modules.keys() <= self._modules
        )

    def image_folder(self, entry: Entry) -> Path | None:
        """Return where the image of an adapter is, or will be; None if it takes no place."""
        if entry.snapshot is None or not self.takes(entry):
            return None
        return self.images.folder(entry.name, entry.snapshot.digest)

    @property
    def numbers(self) -> Collection[int]:
        """The numbers of the versions that are in a place."""
        return self._filled.keys()

    @property
    def waiting(self) -> int:
        """How many requests wait for a place."""
        return self._waiting.total()

    # What a request goes through: wait until its version is in a place, hold it there, let go.

    def preparation(self, who: Occupant) -> Awaitable[str | None] | None:
        """Return what has to be awaited before it may run; None if it is in a place."""
        if who.number in self._filled and who.number != self._leaving:
            self._filled.move_to_end(who.number)
            return None
        return self._wait_for(who)

    async def _wait_for(self, who: Occupant) -> str | None:
        task = self._loading.get(who.number)
        if task is None:
            task = asyncio.ensure_future(self._load(who))
            self._loading[who.number] = task
            task.add_done_callback(lambda _: self._loading.pop(who.number, None))
        self._waiting[who.number] += 1
        try:
            return await asyncio.wait_for(asyncio.shield(task), _WAIT_S)
        except TimeoutError as error:
            raise LifecycleError(
                503,
                f"no place of full-rank adapters ({self.spec.count}, --resident) was ready for "
                f"{_WAIT_S:g} s: other requests use them, or they are being filled",
            ) from error
        finally:
            self._waiting[who.number] -= 1
            self._waiting = +self._waiting
            self._released.set()

    @contextmanager
    def held(self, number: int) -> Iterator[None]:
        """Keep a version in its place meanwhile."""
        self._users[number] += 1
        try:
            yield
        finally:
            self._users[number] -= 1
            if not self._users[number]:
                del self._users[number]
                self._released.set()

    @contextmanager
    def admit(self, model: str, version: Version) -> Iterator[None]:
        """Keep a version in its place during a request, for which ``model`` means that version."""
        before = ADMITTED.set((model, version))
        try:
            with self.held(version.number):
                yield
        finally:
            ADMITTED.reset(before)

    @contextmanager
    def all_held(self) -> Iterator[None]:
        """Keep whatever is in a place now there meanwhile."""
        numbers = list(self._filled)
        self._users.update(numbers)
        try:
            yield
        finally:
            self._users.subtract(numbers)
            self._users = +self._users
            self._released.set()

    # How a place is filled.

    @property
    def has_room(self) -> bool:
        """Whether a place is free."""
        return bool(self._free)

    async def make_image(self, content: Path, folder: Path) -> str | None:
        """Make the image of an adapter; return why that cannot be done, or None.

        Raises:
            StorageError: it cannot be written, which is not the adapter's fault.
        """
        try:
            await self.images.make(folder, [str(content)])
        except StorageError:
            raise
        except SecuraError as error:
            return str(error)
        return None

    async def _load(self, who: Occupant) -> str | None:
        """Put it into a place; return why that cannot be done, or None."""
        assert self.workers is not None
        try:
            if who.kept:
                # While others are being filled in.
                await self.images.make(who.image, who.specs)
        except SecuraError as error:
            return str(error)
        async with self._one_at_a_time:
            if who.number in self._filled or who.number not in self._waiting:
                # Whoever asked has gone, or it came back to its place.
                return None
            place = await self._empty_place(who)
            if place is None:
                return None
            begin = time.perf_counter()
            try:
                refused = await self._copy(who, place)
                if refused is None:
                    await self.workers.publish(place, who.image)
                    self._filled[who.number] = (who, place)
            except SecuraError as error:
                refused = str(error)
            finally:
                if who.number not in self._filled:
                    self._free.append(place)
            if refused is not None:
                return refused
            self._observer.place_filled(time.perf_counter() - begin)
            return None

    async def _copy(self, who: Occupant, place: int) -> str | None:
        """Copy its image into a place; return why that cannot be done, or None."""
        # Made again: it may have left its place since, and its image with it.
        refused = await self._fill(place, await self.images.make(who.image, who.specs))
        if refused is None or await self._is_whole(who.image):
            return refused
        # Another server, which needs it no more, has removed the image meanwhile.
        return await self._fill(place, await self.images.make(who.image, who.specs))

    async def _is_whole(self, image: Path) -> bool:
        try:
            await asyncio.to_thread(self.images.found, image)
        except StorageError:
            return False
        return True

    async def _fill(self, place: int, image: DeltaImage) -> str | None:
        assert self.workers is not None
        each = max(1, len(image.modules) * _CHUNK // max(1, image.size))
        for first in range(0, len(image.modules), each):
            refused = await self.workers.fill(place, image.folder, first, first + each)
            if refused is not None:
                return refused
        return None

    async def _empty_place(self, who: Occupant) -> int | None:
        """Return a place that is free, or that of an update that nobody uses; None once nobody
        waits for ``who`` any more."""
        try:
            while who.number in self._waiting:
                if self._free:
                    return self._free.pop()
                candidates = [n for n in self._filled if n not in self._pinned]
                idle = [n for n in candidates if self._is_idle(n)]
                if idle:
                    await self._evict(idle[0])
                    self._observer.place_taken()
                    continue
                if self._leaving is None:
                    # Those who come for it from now on wait, too: it would never be idle otherwise.
                    # But not before those for whom it was filled have had it.
                    used = (n for n in candidates if n not in self._waiting)
                    self._leaving = next(used, None)
                self._released.clear()
                await self._released.wait()
            return None
        finally:
            self._leaving = None

    def _is_idle(self, number: int) -> bool:
        """Return whether nobody uses it, or has waited for it and is about to."""
        wanted = number in self._waiting and number != self._leaving
        return number not in self._users and not wanted

    async def _evict(self, number: int) -> None:
        assert self.workers is not None
        who, place = self._filled.pop(number)
        try:
            await self.workers.forget_place(number, who.image)
        finally:
            # Also where the call did not get through: whoever comes next overwrites what is there.
            self._free.append(place)
        if not who.kept:
            await asyncio.to_thread(self.images.remove, who.image)

    # What an operator decides.

    def _may_pin(self, number: int) -> bool:
        return len(self._pinned - {number}) + 1 < self.spec.count

    async def pin(self, version: Version, pinned: bool) -> None:
        """Keep a version in a place, or no longer.

        Raises:
            LifecycleError: (409) no place is free for it.
        """
        if not pinned:
            self._pinned.discard(version.number)
            self._released.set()
            return
        if not self._may_pin(version.number):
            raise LifecycleError(
                409,
                f"{version.name} cannot be pinned: one of the {self.spec.count} places of "
                "full-rank adapters must stay free for the others; unpin one, or restart with more "
                "--resident",
            )
        work = self.preparation(Occupant.of(version))
        if work is not None and (refused := await work) is not None:
            raise LifecycleError(409, f"{version.name} cannot be pinned: {refused}")
        self._pinned.add(version.number)

    async def forget(self, who: Occupant) -> None:
        """Empty the place of what nobody can ask for any more, and remove its image."""
        self._pinned.discard(who.number)
        if (task := self._loading.get(who.number)) is not None:
            with suppress(Exception):
                await asyncio.shield(task)
        async with self._one_at_a_time:
            if who.number in self._filled:
                await self._evict(who.number)
        if not who.lasting:
            await asyncio.to_thread(self.images.remove, who.image)

    def hold(self, request: Any) -> AbstractContextManager[None]:
        """Return what keeps the adapter of a ``LoRARequest`` in its place, if it needs one.

        Raises:
            LifecycleError: (503) it is in no place.
        """
        if request is None or Path(request.lora_path).parent != self.images.root:
            return nullcontext()
        if request.lora_int_id not in self._filled:
            raise LifecycleError(503, f"{request.lora_name} left its place: try again")
        return self.held(request.lora_int_id)
