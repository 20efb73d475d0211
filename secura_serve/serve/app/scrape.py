"""What a scrape of ``/metrics`` brings up to date first: the states of the adapters."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from starlette.types import ASGIApp, Receive, Scope, Send

from secura_serve.serve.app.adapters.updates import AdapterUpdates
from secura_serve.serve.app.adapters.workers import Workers
from secura_serve.serve.app.folding import Folding
from secura_serve.serve.app.http.routes import routed_path
from secura_serve.serve.app.metrics import Metrics

__all__ = ["AdapterStates", "ScrapeMiddleware"]

# A scrape shows what is known then. The engine answers between two steps, and not during a fold.
_LONGEST_S = 0.25


class AdapterStates:
    """Sets the gauges, and counts what the engine has loaded and evicted."""

    def __init__(self, metrics: Metrics, updates: AdapterUpdates, folding: Folding) -> None:
        self._metrics, self._updates, self._folding = metrics, updates, folding
        self._asking: asyncio.Task[None] | None = None

    async def refresh(self) -> None:
        """Bring the metrics up to date, as far as the engine answers at once."""
        records = list(self._updates.library.records.values())
        self._metrics.set_adapters(
            known=sum(r.serving is not None for r in records),
            pinned=sum(r.pinned for r in records),
            refused=sum(r.serving is None and r.refused is not None for r in records),
        )
        self._metrics.set_versions(sum(len(r.versions) for r in records))
        if (places := self._updates.residency.places) is not None:
            filled = len(places.numbers)
            self._metrics.set_places(
                filled=filled, free=places.spec.count - filled, waiting=places.waiting
            )
        workers = self._updates.residency.workers
        if workers is None or self._folding.busy:
            return
        if self._asking is None or self._asking.done():
            self._asking = asyncio.ensure_future(self._ask(workers))
        await asyncio.wait([self._asking], timeout=_LONGEST_S)

    async def _ask(self, workers: Workers) -> None:
        # An engine that has died is reported elsewhere.
        with suppress(Exception):
            resident = await self._updates.residency.numbers()
            self._metrics.set_adapters(resident=len(resident))
            self._metrics.count_slot_changes(workers.loads, workers.evictions)


class ScrapeMiddleware:
    """Refreshes the metrics before ``/metrics`` is answered."""

    def __init__(self, app: ASGIApp, states: AdapterStates) -> None:
        self._app, self._states = app, states

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and routed_path(scope).startswith("/metrics"):
            await self._states.refresh()
        await self._app(scope, receive, send)
