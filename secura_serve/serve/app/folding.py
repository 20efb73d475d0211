"""Which adapter is folded into the running engine, and the one way to change that.

The state belongs to the API server's process; the engine follows it. A change closes admission,
waits for the requests that run, pauses the engine (which forgets its prefix cache), has every rank
put the new weights in place, renames what the server answers to, and admits requests again.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Collection, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from secura_serve.adapter import Adapter, is_plain_lora
from secura_serve.errors import ConfigError, FoldError, MergeError
from secura_serve.merge import verify_base
from secura_serve.serve.app.base_files import BaseFiles
from secura_serve.serve.app.http.admission import Admission, Refusal
from secura_serve.serve.app.snapshots import Snapshot
from secura_serve.serve.compat import ServedModels
from secura_serve.suggest import did_you_mean, near_names

__all__ = ["DEFAULT_TIMEOUT", "Folding"]

DEFAULT_TIMEOUT = 60.0
"""Seconds that a change waits for running requests."""
# Names that an error lists; /v1/models has them all.
_LISTED = 20


class Folding:
    """What is folded, who may ask for what, and the change from one to another.

    Args:
        base: the base's folder.
        names: what the base is called in requests.
        adapters: all that can be folded.
        per_request: names of those that can also be chosen per request, and of plain LoRAs.
        snapshots: name -> the verified copy that is served, for telling when its source changes.
    """

    def __init__(
        self,
        base: Path,
        names: Sequence[str],
        adapters: Iterable[Adapter],
        per_request: Iterable[str],
        snapshots: Mapping[str, Snapshot] | None = None,
    ) -> None:
        self.base, self.names = base, tuple(names)
        self._base_files = BaseFiles(base)
        self.snapshots = dict(snapshots or {})
        self.paths = {adapter.name: adapter.path for adapter in adapters}
        # Asked for every request, so not worked out anew each time.
        self._per_request: Collection[str] = set(per_request)
        self._only_folded = self.paths.keys() - self._per_request
        self.folded: str | None = None
        self.broken: str | None = None
        """Why the weights are no longer known; the server is then on its way out."""
        self.admission = Admission(self.refusal)
        self._one_at_a_time = asyncio.Lock()
        # Where threads cannot be bound there are none to name, and the fold runs in one.
        self._cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        self._engine: Any = None
        self._models: ServedModels | None = None

    def bind(self, engine: Any, models: ServedModels) -> None:
        """Take hold of the engine once it is there."""
        self._engine, self._models = engine, models
        # vLLM's own table: an adapter can be loaded and unloaded while the server runs.
        self._per_request = models.adapters
        models.describe(
            self.status,
            more=[(name, self._source(name)) for name in self.paths if name in self._only_folded],
            root=lambda name: s.source if (s := self.snapshots.get(name)) else None,
        )

    def _source(self, name: str) -> Path:
        """Return the folder that the user knows, not its copy."""
        return self.snapshots[name].source if name in self.snapshots else self.paths[name]

    def serve_from(self, name: str, snapshot: Snapshot) -> None:
        """Take note of an adapter that was loaded at run time, or of its new content."""
        self.snapshots[name] = snapshot
        if not is_plain_lora(snapshot.path):
            self.paths[name] = snapshot.path

    def forget(self, name: str) -> None:
        """Take note of an adapter that was unloaded: it cannot be folded either."""
        self.snapshots.pop(name, None)
        self.paths.pop(name, None)

    def changed_on_disk(self) -> list[str]:
        """Return the adapters whose folder no longer holds what is served."""
        return [name for name, snapshot in self.snapshots.items() if snapshot.has_changed()]

    def known(self, name: str) -> bool:
        """Return whether any model has this name, whether or not it answers now."""
        return name in self.names or name in self.paths or name in self._per_request

    def answering(self) -> list[str]:
        """Return the names that answer now, the base's first."""
        if self.folded is not None:
            return [self.folded]
        return [*self.names, *sorted(self._per_request)]

    @property
    def busy(self) -> bool:
        """Whether a change is under way."""
        return self._one_at_a_time.locked()

    @asynccontextmanager
    async def unfolded(self) -> AsyncIterator[None]:
        """Keep the base in the weights for the block.

        Raises:
            FoldError: an adapter is folded, or a change is under way.
        """
        if self.busy:
            raise FoldError("nothing was changed: a fold is under way; try again after it")
        async with self._one_at_a_time:
            if self.folded is not None or self.broken is not None:
                raise FoldError(
                    f"nothing was changed: {self.folded or 'no known adapter'} is folded into the "
                    "weights; POST to /admin/unfold first"
                )
            yield

    def status(self, model: str) -> str:
        """``ready``, ``folded`` (answers, at base cost), ``unfolded`` (must be folded to answer)
        or ``blocked`` (another adapter is folded)."""
        if self.folded is not None:
            return "folded" if model == self.folded else "blocked"
        return "unfolded" if model in self._only_folded else "ready"

    def refusal(self, model: str | None) -> Refusal | None:
        """Return why a request for ``model`` cannot be answered now, or None if it can."""
        if self.broken is not None:
            return Refusal(503, f"the server is stopping: {self.broken}")
        if model is not None and not self.known(model):
            return Refusal(404, self.unknown(model))
        if self.folded is None:
            if model is None or self.status(model) == "ready":
                return None
            return Refusal(
                409,
                f"{model} answers only while it is folded into the weights (S-MagNorm makes an "
                "adapter full-rank, and not every architecture takes adapters per request): the "
                f'operator can POST {{"name": "{model}"}} to /admin/fold or start with --fold '
                f"{model}; or ask for another model",
            )
        if model == self.folded:
            return None
        return Refusal(
            409,
            f"{self.folded} is folded into the weights, so only requests for it are answered, not "
            f"for {model or 'the base'}: ask for {self.folded}, or the operator can POST to "
            "/admin/unfold",
        )

    def unknown(self, model: str) -> str:
        """Return what to tell somebody who asks for a name that no model has."""
        answering = self.answering()
        near = near_names(model, answering)
        listed = ", ".join(answering[:_LISTED])
        more = f" and {len(answering) - _LISTED} more" if len(answering) > _LISTED else ""
        return (
            f"The model `{model[:100]}` does not exist. "
            + (f"Did you mean {' or '.join(near)}? " if near else "")
            + f"Models that answer now: {listed}{more} (GET /v1/models lists all)"
        )

    async def change(
        self, name: str | None, timeout: float | None = DEFAULT_TIMEOUT
    ) -> dict[str, Any]:
        """Fold ``name``, whatever is folded now; None puts the base back.

        What is folded is what was verified at the start, whatever its folder holds by now; the
        result then says ``"changed_on_disk": true``.

        Args:
            timeout: seconds to wait for another change and for running requests; None waits for
                ever.

        Returns:
            What is folded, what was done, and how long it took.

        Raises:
            ConfigError: no adapter of that name.
            FoldError: the fold failed and the base was put back, or running requests took longer
                than ``timeout`` and nothing changed, or the server must stop.
        """
        if name is not None and name not in self.paths:
            raise ConfigError(self._no_adapter(name))
        begin = time.perf_counter()
        try:
            await asyncio.wait_for(self._one_at_a_time.acquire(), timeout)
        except TimeoutError as error:
            raise FoldError(
                f"nothing was changed: another fold was still under way after {timeout:g} s"
            ) from error
        try:
            if self.broken is not None:
                raise FoldError(f"the server is stopping: {self.broken}")
            drift = await self._drift(name)
            if name == self.folded:
                return {"folded": name, "changed": False, **drift}
            # While the engine still answers: most faults show here, and none is looked for twice.
            proof = None if name is None else await asyncio.to_thread(self._look, name)
            left = None if timeout is None else max(0.0, begin + timeout - time.perf_counter())
            try:
                async with self.admission.closed(left):
                    done = await self._put(name, proof)
            except TimeoutError as error:
                raise FoldError(
                    f"nothing was changed: running requests ({self.admission.running}) took longer "
                    f"than {timeout:g} s; try again, or with a longer timeout"
                ) from error
        finally:
            self._one_at_a_time.release()
        total = time.perf_counter() - begin
        what = f"folded {name}: it alone is answered" if name else "unfolded: all answer again"
        print(f"secura-serve: {what} (after {total:.2f} s)", flush=True)
        return {"folded": name, "changed": True, **done, "total_seconds": total, **drift}

    async def _drift(self, name: str | None) -> dict[str, Any]:
        snapshot = self.snapshots.get(name) if name is not None else None
        if snapshot is None or not await asyncio.to_thread(snapshot.has_changed):
            return {}
        print(
            f"secura-serve: {snapshot.source} has changed since the start; {name} is served as it "
            "was then (restart to serve the new files)",
            flush=True,
        )
        return {"changed_on_disk": True}

    def _no_adapter(self, name: str) -> str:
        if name in self.names:
            return f"{name!r} is the base: POST to /admin/unfold puts it back"
        if name in self._per_request:
            return f"{name!r} is a plain LoRA: it is chosen per request, and not folded"
        hint = did_you_mean(name, self.paths)
        return f"no adapter {name!r} to fold; there are {', '.join(self.paths) or 'none'}{hint}"

    def _look(self, name: str) -> str:
        try:
            proof: str = verify_base(str(self.base), [str(self.paths[name])])
        except MergeError as error:
            raise FoldError(f"{name} cannot be folded, nothing was changed: {error}") from error
        return proof

    async def _put(self, name: str | None, proof: str | None) -> dict[str, Any]:
        """Change the engine's weights while nothing is admitted."""
        assert self._models is not None
        if changed := self._base_files.changed():
            raise FoldError(
                f"nothing was changed: {changed} of the base in {self.base} is not what it was at "
                "the start; put it back, or restart the server"
            )
        await self._engine.pause_generation(mode="wait", clear_cache=True)
        path = None if name is None else str(self.paths[name])
        try:
            ranks = await self._engine.collective_rpc(
                "secura_fold", args=(path, self._cores, proof)
            )
        except Exception as error:
            await self._restore(error)
            raise FoldError(f"the fold failed and the base was put back: {error}") from error
        self.folded = name
        await self._models.answer_as(None if name is None else (name, str(self._source(name))))
        await self._engine.resume_generation()
        slowest: dict[str, Any] = max(ranks, key=lambda rank: float(rank["seconds"]))
        return slowest

    async def _restore(self, cause: Exception) -> None:
        """Put the base back on every rank, or end the server."""
        assert self._models is not None
        self.folded = None
        try:
            if changed := self._base_files.changed():
                raise FoldError(f"{changed} of the base has changed meanwhile")
            await self._engine.collective_rpc("secura_fold", args=(None, self._cores))
            await self._models.answer_as(None)
            await self._engine.resume_generation()
        except Exception as error:
            self.broken = f"a fold failed ({cause}) and the base could not be put back ({error})"
            os.kill(os.getpid(), signal.SIGTERM)
            raise FoldError(f"the server is stopping: {self.broken}") from error
