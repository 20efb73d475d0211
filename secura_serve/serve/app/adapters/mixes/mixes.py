"""The mixes that the engine knows: a bounded number, the least recently asked is forgotten first.

A mix has no file. The workers make its row of the bank from the rows of its parts when they are
told of it, before its first request runs; see ``serve/engine/mixing.py``. Where a norm acts on the
sum, it is full-rank: its update is made and put into a place as that of an adapter is.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass

from secura_serve.errors import MixError
from secura_serve.serve.app.adapters.library import Library, Version
from secura_serve.serve.app.adapters.mixes.canonical_mix import CanonicalMix, canonical_mix_of
from secura_serve.serve.app.adapters.mixes.grammar import is_expression
from secura_serve.serve.app.adapters.resident.slots import Occupant, ResidentSlots
from secura_serve.serve.app.adapters.workers import Workers

__all__ = ["LIMIT", "Mix", "Mixes", "asked_mix"]

LIMIT = 256
"""How many mixes the engine knows at a time."""
LEAVING = 4096
"""How many more may wait until the requests that ran when they left have ended."""


@dataclass(eq=False)
class Mix:
    """One mix that the engine knows, or is being told of."""

    canonical: CanonicalMix
    number: int
    """What vLLM knows it by (``lora_int_id``); nothing else of this process has it."""
    told: asyncio.Future[str | None] | None = None
    """Why a worker refuses it, or None, once all have answered."""
    occupant: Occupant | None = None
    """What stands for it in a place, where a norm makes the sum full-rank."""
    departures: int = 0
    """How often it has been let go."""

    @property
    def engine_path(self) -> str:
        """By what the engine knows its content."""
        return self.canonical.path if self.occupant is None else str(self.occupant.image)


_ASKED: ContextVar[tuple[str, Version | Mix | None] | None] = ContextVar(
    "secura_asked_mix", default=None
)


def asked_mix(model: object) -> tuple[Version | Mix | None] | None:
    """Return what the current request's mix stands for, in a tuple; None if it asked for none.

    Within: the mix, or the adapter or (None) the base that the expression comes down to. A request
    keeps what it was admitted for, whatever its names stand for by now.
    """
    asked = _ASKED.get()
    return (asked[1],) if asked is not None and asked[0] == model else None


class Mixes:
    """Which mixes the engine knows, and which one each request asked for.

    Args:
        library: what the parts are looked up in.
        workers: what the engine's workers hold, once it is there.
        number: gives a ``lora_int_id`` that nothing else has.
        ended: returns once every request that runs now has ended.
        limit: how many are known at a time.

    ``resident`` may be set: the places of full-rank adapters.
    """

    resident: ResidentSlots | None = None

    def __init__(
        self,
        library: Library,
        workers: Callable[[], Workers | None],
        number: Callable[[], int],
        ended: Callable[[], Awaitable[None]] | None = None,
        *,
        limit: int = LIMIT,
    ) -> None:
        self._library, self._workers, self._number = library, workers, number
        self._ended, self._limit = ended, limit
        self._known: OrderedDict[str, Mix] = OrderedDict()
        # Nobody can be given one of these any more, while requests may still run on it.
        self._leaving: dict[str, Mix] = {}
        self._sweeping: asyncio.Task[None] | None = None

    def __len__(self) -> int:
        return len(self._known)

    def means_mix(self, model: str | None) -> bool:
        """Return whether a request's model is an expression: a model of that very name wins."""
        return is_expression(model) and model not in self._library.bases

    def preparation(self, text: str) -> Awaitable[str | None] | None:
        """Return what a request for a mix has to wait for before it may run, or None.

        Awaited, it gives None, or why the workers cannot serve it.

        Raises:
            MixError: it means nothing.
        """
        workers = self._workers()
        canonical = canonical_mix_of(text, self._library)
        if canonical.nothing or workers is None:
            return None
        if canonical.alone is not None:
            if canonical.alone.image is not None and self.resident is not None:
                return self.resident.preparation(Occupant.of(canonical.alone))
            return workers.preparation(canonical.alone)
        if (mix := self._get(canonical)) is None:
            return _too_many()
        if mix.occupant is not None and self.resident is not None:
            return self.resident.preparation(mix.occupant)
        if mix.told is None or (mix.told.done() and _failed(mix.told)):
            mix.told = asyncio.ensure_future(self._tell(mix, workers))
        if mix.told.done() and mix.told.result() is None:
            return None
        return self._answer(mix, mix.told)

    @contextmanager
    def asked(self, model: str | None) -> Iterator[None]:
        """Give the current request what it was admitted for, until the block ends."""
        if model is None or not self.means_mix(model):
            yield
            return
        canonical = canonical_mix_of(model, self._library)
        found: Version | Mix | None = canonical.alone
        if found is None and not canonical.nothing:
            found = self._known[canonical.path]
        before = _ASKED.set((model, found))
        try:
            with self._held(found):
                yield
        finally:
            _ASKED.reset(before)

    def _held(self, found: Version | Mix | None) -> AbstractContextManager[None]:
        """Return what keeps an adapter or a mix in its place, where it needs one."""
        needs = found.occupant if isinstance(found, Mix) else found and found.image
        if found is None or not needs or self.resident is None:
            return nullcontext()
        return self.resident.held(found.number)

    def drop(self, versions: Iterable[Version]) -> None:
        """Forget the mixes of versions that nobody can ask for any more."""
        gone = {version.engine_name for version in versions}
        for path in [p for p, mix in self._known.items() if mix.canonical.has_any(gone)]:
            self._let_go(path)

    def _get(self, canonical: CanonicalMix) -> Mix | None:
        """Return the mix, the most recently asked from now on; None if too many others cannot be
        forgotten yet."""
        path = canonical.path
        # One that is asked for again before it is gone stays: the engine must not have the same
        # mix under two numbers.
        mix = self._known.get(path) or self._leaving.pop(path, None)
        if mix is None:
            if len(self._leaving) >= LEAVING:
                return None
            mix = Mix(canonical, self._number())
            if canonical.full_rank and self.resident is not None:
                mix.occupant = self._occupant(mix, self.resident)
        self._known[path] = mix
        self._known.move_to_end(path)
        while len(self._known) > self._limit:
            self._let_go(next(iter(self._known)))
        return mix

    def _occupant(self, mix: Mix, resident: ResidentSlots) -> Occupant:
        """Return what stands for a mix in a place: a fold of the sum, made anew each time."""
        canonical = mix.canonical
        image = resident.images.own_folder(mix.number)
        specs = tuple(f"{v.snapshot.path}*{weight!r}" for v, weight in canonical.parts)
        return Occupant(mix.number, canonical.shown, image, specs, kept=False)

    async def _tell(self, mix: Mix, workers: Workers) -> str | None:
        """Have every worker make a mix from its parts; return why one refuses, or None."""
        for version, _ in mix.canonical.parts:
            reading = workers.preparation(version)
            if reading is not None and (why := await reading) is not None:
                return f"{version}: {why}"
        return await workers.register_mix(mix.canonical.engine_name, mix.canonical.path)

    async def _answer(self, mix: Mix, told: asyncio.Future[str | None]) -> str | None:
        why = await asyncio.shield(told)
        # A part may have gone meanwhile: the request is then judged again, by what is there now.
        return why if self._known.get(mix.canonical.path) is mix else None

    def _let_go(self, path: str) -> None:
        self._leaving[path] = mix = self._known.pop(path)
        mix.departures += 1
        if self._sweeping is None or self._sweeping.done():
            self._sweeping = asyncio.ensure_future(self._sweep())

    async def _sweep(self) -> None:
        """Have the workers forget what leaves, once no request can be running on it."""
        while self._leaving:
            leaving = [(mix, mix.departures) for mix in self._leaving.values()]
            if self._ended is not None:
                await self._ended()
            # One that came back, and even left again, is not what was waited for.
            gone = [
                mix
                for mix, departures in leaving
                if mix.departures == departures and mix.canonical.path in self._leaving
            ]
            for mix in gone:
                del self._leaving[mix.canonical.path]
            workers, places = self._workers(), self.resident
            for mix in gone:
                if mix.occupant is not None and places is not None:
                    await places.forget(mix.occupant)
            rows = [mix for mix in gone if mix.occupant is None]
            if rows and workers is not None:
                await workers.release(
                    [mix.number for mix in rows], [mix.canonical.path for mix in rows]
                )


async def _too_many() -> str | None:
    raise MixError(503, "too many different mixes are being answered")


def _failed(call: asyncio.Future[str | None]) -> bool:
    """Return whether a call did not get through, so that the next request tries again."""
    return call.cancelled() or call.exception() is not None
