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
from pathlib import Path
from typing import Any

from secura_serve.errors import ConfigError, FoldError, MergeError
from secura_serve.merge import verify_base
from secura_serve.serve.app.adapters.library import Version
from secura_serve.serve.app.answers import Answers
from secura_serve.serve.app.base_files import BaseFiles
from secura_serve.serve.app.http.admission import Admission
from secura_serve.serve.app.observer import Observer
from secura_serve.serve.compat import ServedModels
from secura_serve.serve.logs import say
from secura_serve.suggest import did_you_mean

__all__ = ["DEFAULT_TIMEOUT", "Folding"]

DEFAULT_TIMEOUT = 60.0
"""Seconds that a change waits for running requests."""


class Folding:
    """The change of what is folded, and the admission that it closes meanwhile.

    Args:
        base: the base's folder.
        answers: what the server answers to; says what is folded.
        observer: is told how long each change took.
    """

    def __init__(self, base: Path, answers: Answers, observer: Observer | None = None) -> None:
        self.base, self.answers = base, answers
        self._base_files = BaseFiles(base)
        self._observer = observer or Observer()
        self._folding: tuple[str | None, Version | None] = (None, None)
        self.admission = Admission(answers.refusal)
        self._one_at_a_time = asyncio.Lock()
        # Where threads cannot be bound there are none to name, and the fold runs in one.
        self._cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        self._engine: Any = None
        self._models: ServedModels | None = None

    def bind(self, engine: Any, models: ServedModels) -> None:
        """Take hold of the engine once it is there."""
        self._engine, self._models = engine, models

    def held(self) -> list[tuple[str | None, Version | None]]:
        """Return what must neither go nor change its name: what is folded, or is about to be."""
        return [(self.answers.folded, self.answers.folded_version), self._folding]

    def foldable(self) -> list[str]:
        """Return the names of the adapters that can be folded."""
        return [version.name for version in self.answers.library if version.foldable]

    def changed_on_disk(self) -> list[str]:
        """Return the adapters whose folder no longer holds what is served."""
        return [v.name for v in self.answers.library if v.snapshot.has_changed()]

    @property
    def busy(self) -> bool:
        """Whether a change is under way."""
        return self._one_at_a_time.locked()

    async def change(
        self, name: str | None, timeout: float | None = DEFAULT_TIMEOUT
    ) -> dict[str, Any]:
        """Fold ``name``, whatever is folded now; None puts the base back.

        What is folded is the verified version that the name stands for, whatever its folder holds
        by now; the result then says ``"changed_on_disk": true``. A name that is folded already is
        folded again if it stands for a newer version since.

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
        if name is not None:
            self._wanted(name)
        begin = time.perf_counter()
        try:
            await asyncio.wait_for(self._one_at_a_time.acquire(), timeout)
        except TimeoutError as error:
            raise FoldError(
                f"nothing was changed: another fold was still under way after {timeout:g} s"
            ) from error
        try:
            if self.answers.broken is not None:
                raise FoldError(f"the server is stopping: {self.answers.broken}")
            # Its name may stand for a newer version than when this call began to wait.
            version = None if name is None else self._wanted(name)
            self._folding = (name, version)
            drift = await self._drift(version)
            if name == self.answers.folded and version is self.answers.folded_version:
                return {"folded": name, "changed": False, **drift}
            # While the engine still answers: most faults show here, and none is looked for twice.
            proof = None if version is None else await asyncio.to_thread(self._look, version)
            left = None if timeout is None else max(0.0, begin + timeout - time.perf_counter())
            try:
                async with self.admission.closed(left):
                    done = await self._put(name, version, proof)
            except TimeoutError as error:
                raise FoldError(
                    f"nothing was changed: running requests ({self.admission.running}) took longer "
                    f"than {timeout:g} s; try again, or with a longer timeout"
                ) from error
        finally:
            self._folding = (None, None)
            self._one_at_a_time.release()
        total = time.perf_counter() - begin
        what = f"folded {name}: it alone is answered" if name else "unfolded: all answer again"
        self._observer.weights_folded(total)
        say(f"{what} (after {total:.2f} s)")
        return {"folded": name, "changed": True, **done, "total_seconds": total, **drift}

    async def _drift(self, version: Version | None) -> dict[str, Any]:
        if version is None or not await asyncio.to_thread(version.snapshot.has_changed):
            return {}
        say(
            f"{version.snapshot.source} does not hold what is served as "
            f"{version.name}; that is {version} (POST /v1/adapters/reload serves the new files)"
        )
        return {"changed_on_disk": True}

    def _wanted(self, name: str) -> Version:
        """Return the version to fold for a name. Raises ConfigError if there is none."""
        library = self.answers.library
        version = library.find(name)
        if version is not None and version.name in library.deleting:
            raise ConfigError(f"{name!r} is being deleted")
        if version is not None and version.foldable:
            return version
        if name in self.answers.names:
            raise ConfigError(f"{name!r} is the base: POST to /admin/unfold puts it back")
        if version is not None:
            kind = "plain LoRA" if version.entry.lora is not None else "whole fine-tune"
            raise ConfigError(f"{name!r} is a {kind}: it is chosen per request, and not folded")
        foldable = self.foldable()
        raise ConfigError(
            f"no adapter {name[:100]!r} to fold; there are {', '.join(foldable) or 'none'}"
            f"{did_you_mean(name, foldable)}"
        )

    def _look(self, version: Version) -> str:
        try:
            proof: str = verify_base(str(self.base), [str(version.snapshot.path)])
        except MergeError as error:
            raise FoldError(
                f"{version.name} cannot be folded, nothing was changed: {error}"
            ) from error
        return proof

    async def _put(
        self, name: str | None, version: Version | None, proof: str | None
    ) -> dict[str, Any]:
        """Change the engine's weights while nothing is admitted."""
        assert self._models is not None
        if changed := self._base_files.changed():
            raise FoldError(
                f"nothing was changed: {changed} of the base in {self.base} is not what it was at "
                "the start; put it back, or restart the server"
            )
        await self._engine.pause_generation(mode="wait", clear_cache=True)
        path = None if version is None else str(version.snapshot.path)
        try:
            ranks = await self._engine.collective_rpc(
                "secura_fold", args=(path, self._cores, proof)
            )
        except Exception as error:
            await self._restore(error)
            raise FoldError(f"the fold failed and the base was put back: {error}") from error
        self.answers.folded, self.answers.folded_version = name, version
        self._models.answer_as(
            (name, str(version.snapshot.source)) if name is not None and version else None
        )
        await self._engine.resume_generation()
        slowest: dict[str, Any] = max(ranks, key=lambda rank: float(rank["seconds"]))
        return slowest

    async def _restore(self, cause: Exception) -> None:
        """Put the base back on every rank, or end the server."""
        assert self._models is not None
        self.answers.folded = self.answers.folded_version = None
        try:
            if changed := self._base_files.changed():
                raise FoldError(f"{changed} of the base has changed meanwhile")
            await self._engine.collective_rpc("secura_fold", args=(None, self._cores))
            self._models.answer_as(None)
            await self._engine.resume_generation()
        except Exception as error:
            broken = f"a fold failed ({cause}) and the base could not be put back ({error})"
            self.answers.broken = broken
            os.kill(os.getpid(), signal.SIGTERM)
            raise FoldError(f"the server is stopping: {broken}") from error
