"""What the engine's workers hold of the adapters, asked and changed from the API server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from secura_serve.errors import LifecycleError
from secura_serve.serve import compat
from secura_serve.serve.app.adapters.library import Version
from secura_serve.serve.app.observer import Observer
from secura_serve.serve.basis import NormBounds

__all__ = ["Workers"]

# Residency is asked for by people and by scrapes; the engine is not to be asked more often.
_FRESH_S = 1.0
_ANSWER_S = 5.0


class Workers:
    """Calls into every worker of every engine, between two of its steps.

    Args:
        engine: vLLM's ``EngineClient``.
        norm_bounds: what the server has compared with the base, see ``AdapterCalls``.
        observer: is told how long the workers took to read an adapter.
    """

    def __init__(
        self,
        engine: Any,
        norm_bounds: Callable[[], Mapping[str, NormBounds]],
        observer: Observer | None = None,
    ) -> None:
        self._engine, self._norm_bounds = engine, norm_bounds
        self._observer = observer or Observer()
        self._read: set[Path] = set()
        self.loads = self.evictions = 0
        """How many adapters all engines have put into a slot, or taken out of one for another,
        until :meth:`resident` was asked last."""
        self._prepared: dict[int, asyncio.Future[str | None]] = {}
        self._resident: tuple[float, frozenset[int]] = (0.0, frozenset())

    async def _engines(self, method: str, *args: Any) -> list[list[Any]]:
        """Return what the ranks of each engine answer."""
        return await compat.ask_engines(self._engine, method, args)

    async def _call(self, method: str, *args: Any) -> list[Any]:
        """Return what every worker answers."""
        return [rank for ranks in await self._engines(method, *args) for rank in ranks]

    async def _read_adapter(self, name: str, path: str, bounds: Mapping[str, Any]) -> str | None:
        """Have every worker keep an adapter, or none; return why one refuses it, or None."""
        said = [why for (why,) in await self._call("secura_prepare", [(name, path)], bounds)]
        refused = next((why for why in said if why is not None), None)
        if refused is not None and None in said:
            await self._call("secura_forget", [], [path])
        return refused

    async def prepare(self, name: str, path: Path) -> str | None:
        """Have every worker read an adapter; return why one refuses it, or None."""
        bounds = {key: dict(value) for key, value in self._norm_bounds().items()}
        begin = time.perf_counter()
        refused = await self._read_adapter(name, str(path), bounds)
        # What the workers have read they do not read again.
        if refused is None and path not in self._read:
            self._read.add(path)
            self._observer.adapter_read(time.perf_counter() - begin)
        return refused

    def preparation(self, version: Version) -> Awaitable[str | None] | None:
        """Return what has to be awaited before a version may run; None if nothing."""
        task = self._prepared.get(version.number)
        if task is None:
            task = asyncio.ensure_future(self.prepare(version.name, version.snapshot.path))
            self._prepared[version.number] = task
        if task.done() and not task.cancelled() and task.exception() is None:
            if task.result() is None:
                return None
        elif task.done():
            # The call did not get through; the next request tries again.
            del self._prepared[version.number]
        return asyncio.shield(task)

    def mark_prepared(self, version: Version) -> None:
        """Take note that every worker has read a version."""
        done: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()
        done.set_result(None)
        self._prepared[version.number] = done

    async def forget(self, version: Version) -> None:
        """Free the slot of a version, and what the workers keep of it."""
        self._resident = (0.0, self._resident[1])
        path = version.snapshot.path
        await self._call("secura_forget", [version.number], [str(path)])
        self._read.discard(path)
        self._prepared.pop(version.number, None)

    async def register_mix(self, name: str, path: str) -> str | None:
        """Have every worker make a mix of adapters that it has read.

        Return why one refuses it, or None.

        Args:
            path: see :func:`~secura_serve.serve.mix_path.mix_path`.
        """
        return await self._read_adapter(name, path, {})

    async def release(self, numbers: Sequence[int], paths: Sequence[str]) -> None:
        """Have the workers forget mixes, by their numbers and paths."""
        self._resident = (0.0, self._resident[1])
        await self._call("secura_forget", list(numbers), list(paths))

    async def drop(self, path: Path) -> None:
        """Have the workers forget what they keep of a folder that no version uses."""
        if path in self._read:
            self._read.discard(path)
            await self._call("secura_forget", [], [str(path)])

    async def fill(self, place: int, image: Path, first: int, last: int) -> str | None:
        """Have every worker copy modules of a delta image into a place; return why one cannot."""
        for refused in await self._call("secura_fill", place, str(image), first, last):
            if refused is not None:
                return str(refused)
        return None

    async def publish(self, place: int, image: Path) -> None:
        """Have every worker answer the adapter of an image from the place that was filled."""
        await self._call("secura_publish", place, str(image))

    async def forget_place(self, number: int, image: Path | None) -> None:
        """Free the slot of an adapter whose place is needed, and what points at the place."""
        self._resident = (0.0, self._resident[1])
        await self._call("secura_forget", [number], [str(image)])

    async def pin(self, version: Version, pinned: bool) -> None:
        """Keep a version in a slot on every worker, or no longer.

        Raises:
            LifecycleError: (409) no slot is free for it.
        """
        args = (version.engine_name, version.number, str(version.snapshot.path))
        self._resident = (0.0, self._resident[1])
        for refused in await self._call("secura_pin", *args, pinned):
            if refused is not None:
                # Other workers may have done it.
                await self._call("secura_pin", *args, False)
                raise LifecycleError(409, f"{version.name} cannot be pinned: {refused}")

    async def resident(self) -> frozenset[int]:
        """Return the numbers of the versions in a slot of some engine, at most a second old.

        While the engine is busy with a fold it does not answer; then the last answer is returned.
        """
        asked, known = self._resident
        if time.monotonic() - asked < _FRESH_S:
            return known
        try:
            engines = await asyncio.wait_for(self._engines("secura_slots"), _ANSWER_S)
        except TimeoutError:
            return known
        # The ranks of an engine do the same; engines have requests of their own.
        slots, loads, evictions = zip(*(ranks[0] for ranks in engines), strict=True)
        self.loads, self.evictions = sum(loads), sum(evictions)
        known = frozenset(number for numbers in slots for number in numbers)
        self._resident = (time.monotonic(), known)
        return known
