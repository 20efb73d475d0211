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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from secura_serve.errors import ConfigError, FoldError, MergeError
from secura_serve.merge import verify_base
from secura_serve.serve.app.adapters.library import Library, Version, split_version
from secura_serve.serve.app.adapters.mixes.grammar import is_expression
from secura_serve.serve.app.adapters.mixes.refusals import refuse_mix
from secura_serve.serve.app.base_files import BaseFiles
from secura_serve.serve.app.http.access import ASKING_KEY
from secura_serve.serve.app.http.admission import Admission, Refusal
from secura_serve.serve.app.observer import Observer
from secura_serve.serve.compat import ServedModels
from secura_serve.serve.logs import say
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
        library: the adapters.
        per_request: whether this engine takes adapters per request at all.
        observer: is told how long each change took.
    """

    def __init__(
        self,
        base: Path,
        names: Sequence[str],
        library: Library,
        *,
        per_request: bool = True,
        observer: Observer | None = None,
    ) -> None:
        self.base, self.names, self.library = base, tuple(names), library
        self._base_files = BaseFiles(base)
        self.per_request = per_request
        self._observer = observer or Observer()
        self.folded: str | None = None
        """The model name that is folded, as it was asked for."""
        self.folded_version: Version | None = None
        self._folding: tuple[str | None, Version | None] = (None, None)
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

    def held(self) -> list[tuple[str | None, Version | None]]:
        """Return what must neither go nor change its name: what is folded, or is about to be."""
        return [(self.folded, self.folded_version), self._folding]

    def foldable(self) -> list[str]:
        """Return the names of the adapters that can be folded."""
        return [version.name for version in self.library if version.foldable]

    def changed_on_disk(self) -> list[str]:
        """Return the adapters whose folder no longer holds what is served."""
        return [v.name for v in self.library if v.snapshot.has_changed()]

    def known(self, name: str) -> bool:
        """Return whether any model has this name, whether or not it answers now."""
        known = name in self.names or self.library.find(name) is not None
        return known or name == self.folded

    def may_ask(self, model: str | None) -> bool:
        """Return whether the key of the current request may ask for a model; None is the base.

        ``NAME@DIGEST`` goes by its name, and an alias by its own name or by what it stands for.
        """
        key = ASKING_KEY.get()
        if key is None:
            return True
        if model is None or model in self.names:
            return any(key.allows(name) for name in self.names)
        meant = (model, self.library.aliases.get(model, model))
        return any(key.allows(split_version(name)[0]) for name in meant)

    def answering(self) -> list[str]:
        """Return the names that answer now and may be asked, the base's first."""
        if self.folded is not None:
            names = [self.folded]
        else:
            names = [*self.names, *sorted(v.name for v in self.library if self._ready(v))]
        return [name for name in names if self.may_ask(name)]

    def _ready(self, version: Version) -> bool:
        """Return whether a version answers while nothing is folded."""
        return self.per_request and version.per_request

    def base_label(self) -> str:
        """Return whose answers the weights give where no adapter is chosen: the base's or those of
        the adapter that is folded."""
        return self.folded_version.name if self.folded_version else self.names[0]

    @property
    def busy(self) -> bool:
        """Whether a change is under way."""
        return self._one_at_a_time.locked()

    def status(self, model: str) -> str:
        """Return whether a model answers now, in one word.

        ``ready``: it does. ``folded``: it does, at the base's cost. ``unfolded``: only once it is
        folded. ``blocked``: not while another adapter is folded.
        """
        if self.folded is not None:
            return "folded" if model == self.folded else "blocked"
        version = self.library.find(model)
        return "ready" if version is None or self._ready(version) else "unfolded"

    def refusal(self, model: str | None) -> Refusal | None:
        """Return why a request for ``model`` cannot be answered now, or None if it can."""
        if self.broken is not None:
            return Refusal(503, f"the server is stopping: {self.broken}")
        if model is not None and is_expression(model) and not self.known(model):
            return refuse_mix(self, model)
        if not self.may_ask(model) or (model is not None and not self.known(model)):
            return Refusal(404, self.unknown(model))
        if self.folded is None:
            if model is None or self.status(model) == "ready":
                return None
            return Refusal(
                409,
                f"{model} answers only while it is folded into the weights ({self._why_folded()}): "
                f'the operator can POST {{"name": "{model}"}} to /admin/fold or start with --fold '
                f"{model}; or ask for another model",
            )
        return None if model == self.folded else self.blocked(model)

    def blocked(self, model: str | None) -> Refusal:
        """Return why a request for ``model`` is not answered while another one is folded."""
        assert self.folded is not None
        if not self.may_ask(self.folded):
            return Refusal(
                409,
                f"another adapter is folded into the weights, so no requests for "
                f"{model or 'the base'} are answered; the operator can POST to /admin/unfold",
            )
        return Refusal(
            409,
            f"{self.folded} is folded into the weights, so only requests for it are answered, not "
            f"for {model or 'the base'}: ask for {self.folded}, or the operator can POST to "
            "/admin/unfold",
        )

    def _why_folded(self) -> str:
        if not self.per_request:
            return "vLLM takes no adapters per request for this architecture"
        return (
            "S-MagNorm makes it full-rank, and the server was started without a place for it in "
            "every linear that it changes, see --resident"
        )

    def unknown(self, model: str | None) -> str:
        """Return what to tell somebody who asks for a name that no model has.

        Says the same of a model that the key of the request may not ask. None is the base.
        """
        if model is None:
            return f"The request names no model. {self._listed()}"
        name, digest = split_version(self.library.aliases.get(model, model))
        record = self.library.records.get(name) if self.may_ask(model) else None
        if record is not None and digest is not None and record.versions:
            kept = ", ".join(str(version) for version in record.versions)
            return (
                f"The model `{model[:100]}` does not exist: {name} has these versions: {kept} (six "
                "or more digits name one)"
            )
        if record is not None and record.refused is not None:
            return f"The adapter `{name}` is not served: {record.refused}"
        near = near_names(model, self.answering())
        return (
            f"The model `{model[:100]}` does not exist. "
            + (f"Did you mean {' or '.join(near)}? " if near else "")
            + self._listed()
        )

    def _listed(self) -> str:
        answering = self.answering()
        listed = ", ".join(answering[:_LISTED]) or "none that this key may ask"
        more = f" and {len(answering) - _LISTED} more" if len(answering) > _LISTED else ""
        return f"Models that answer now: {listed}{more} (GET /v1/models lists all)"

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
            if self.broken is not None:
                raise FoldError(f"the server is stopping: {self.broken}")
            # Its name may stand for a newer version than when this call began to wait.
            version = None if name is None else self._wanted(name)
            self._folding = (name, version)
            drift = await self._drift(version)
            if name == self.folded and version is self.folded_version:
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
        version = self.library.find(name)
        if version is not None and version.name in self.library.deleting:
            raise ConfigError(f"{name!r} is being deleted")
        if version is not None and version.foldable:
            return version
        if name in self.names:
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
        self.folded, self.folded_version = name, version
        self._models.answer_as(
            (name, str(version.snapshot.source)) if name is not None and version else None
        )
        await self._engine.resume_generation()
        slowest: dict[str, Any] = max(ranks, key=lambda rank: float(rank["seconds"]))
        return slowest

    async def _restore(self, cause: Exception) -> None:
        """Put the base back on every rank, or end the server."""
        assert self._models is not None
        self.folded = self.folded_version = None
        try:
            if changed := self._base_files.changed():
                raise FoldError(f"{changed} of the base has changed meanwhile")
            await self._engine.collective_rpc("secura_fold", args=(None, self._cores))
            self._models.answer_as(None)
            await self._engine.resume_generation()
        except Exception as error:
            self.broken = f"a fold failed ({cause}) and the base could not be put back ({error})"
            os.kill(os.getpid(), signal.SIGTERM)
            raise FoldError(f"the server is stopping: {self.broken}") from error
