"""Adapters come, change and go while the server runs: the one place that does it.

Every way in (folder, upload, trainer's push) ends here. Content is copied, verified and prepared on
every worker first; only then does the name stand for it, in one step of the event loop. Requests
that run keep the version that they were given; a version that nobody can ask for any more is taken
from the workers once all requests that ran at that moment have ended.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from secura_serve.adapter.format import CONFIG_NAME, WEIGHTS_NAME
from secura_serve.errors import (
    ConfigError,
    LifecycleError,
    SecuraError,
    StorageError,
    UnservableError,
)
from secura_serve.serve.app.adapters.content.snapshots import files_of
from secura_serve.serve.app.adapters.content.uploaded import (
    check_uploaded,
    remove_folder,
    write_folder,
)
from secura_serve.serve.app.adapters.content.verifier import Entry, Verifier
from secura_serve.serve.app.adapters.library import Library, Version
from secura_serve.serve.app.adapters.mixes.mixes import Mixes
from secura_serve.serve.app.adapters.publisher import Publisher
from secura_serve.serve.app.adapters.pushed import with_new_cores
from secura_serve.serve.app.adapters.residency import Residency
from secura_serve.serve.app.adapters.retirement import Retirement
from secura_serve.serve.app.adapters.state import StateFile
from secura_serve.serve.app.observer import Observer
from secura_serve.serve.logs import say as say_line

__all__ = ["AdapterUpdates"]

P = ParamSpec("P")
R = TypeVar("R")
_Change = Callable[Concatenate["AdapterUpdates", P], Coroutine[Any, Any, R]]


def _counting_refusals(change: _Change[P, R]) -> _Change[P, R]:
    """Have the observer told of what a change refuses."""

    @wraps(change)
    async def counted(self: AdapterUpdates, /, *args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return await change(self, *args, **kwargs)
        except SecuraError as error:
            self.observer.adapter_refused(error)
            raise

    return counted


class AdapterUpdates:
    """Changes which adapters a server has.

    Args:
        root: the adapters folder; None if the server was started without one.
        library: what there is.
        verifier: checks new content; has a store.
        state: where decisions outlive a restart; None forgets them.
        ended: returns once every request that runs now has ended.
        say: tells the operator one line.
        observer: is told of every refusal.
    """

    def __init__(
        self,
        root: Path | None,
        library: Library,
        verifier: Verifier,
        state: StateFile | None = None,
        ended: Callable[[], Awaitable[None]] | None = None,
        say: Callable[[str], None] = say_line,
        observer: Observer | None = None,
    ) -> None:
        self.root, self.library, self.verifier, self.state = root, library, verifier, state
        self.say = say
        self.observer = observer or Observer()
        self.residency = Residency()
        self.folded: Callable[[], Sequence[tuple[str | None, Version | None]]] = lambda: ()
        """The model names that are folded into the weights, or are about to be, and their
        versions."""
        self._numbers = itertools.count(1)
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self.mixes = Mixes(library, lambda: self.residency.workers, self._numbers.__next__, ended)
        self.retirement = Retirement(
            library, self.residency, self.mixes, verifier.store, self._locks, ended
        )
        self._publisher = Publisher(
            library,
            verifier,
            self.residency,
            self.retirement,
            self._numbers.__next__,
            state,
            self.say,
        )

    def fill(self, entries: Iterable[Entry]) -> None:
        """Take what the adapters folder held at the start, and what an earlier run decided."""
        aliases = self.state.aliases() if self.state is not None else {}
        for entry in entries:
            if entry.name in aliases and entry.error is None:
                what = f"{entry.name!r} is an alias of {aliases[entry.name]}; remove that first"
                entry = replace(entry, snapshot=None, error=ConfigError(what))
            if entry.error is not None or entry.snapshot is None:
                self.library.refuse(entry.name, str(entry.error))
                if entry.error is not None:
                    self.observer.adapter_refused(entry.error)
                continue
            try:
                weights = files_of(entry.snapshot.source)[-1]
                created = (entry.snapshot.source / weights).stat().st_mtime
            except OSError:  # It went after it was copied.
                created = time.time()
            try:
                version = self._publisher.make_version(
                    entry.snapshot, origin="folder", created=created, entry=entry
                )
            except UnservableError as error:
                self.library.refuse(entry.name, str(error))
                self.observer.adapter_refused(error)
                self.say(f"warning: {error}")
                continue
            self.library.add(version)
        if self.state is not None and self.verifier.store is not None:
            for lost in self.state.restore(
                self.library, self.verifier.store, self._publisher.make_version
            ):
                self.say(lost)

    def stop(self) -> None:
        """Give up what is made in the background: the end of the process would wait for it."""
        if self.verifier.images is not None:
            self.verifier.images.stop()

    # What the routes and the watch call.

    @_counting_refusals
    async def from_folder(self, name: str) -> Version:
        """Serve what the folder ``name`` below the root holds now.

        Raises:
            SecuraError: it cannot be served; what was served before still is.
        """
        root = self._root()
        async with self._locks[name]:
            try:
                self.library.check_free(name)
                entry = await asyncio.to_thread(self.verifier.examine, root / name)
                return await self._publisher.publish(entry, "folder")
            except StorageError:
                raise
            except SecuraError as error:
                self.library.refuse(name, str(error))
                raise

    @_counting_refusals
    async def upload(self, name: str, files: Mapping[str, bytes]) -> Version:
        """Write an adapter into the folder, in one step, and serve it.

        Args:
            files: see :func:`check_uploaded`.

        Raises:
            SecuraError: it cannot be served or written; folder and server are as before.
        """
        root = self._root()
        check_uploaded(files)
        async with self._locks[name]:
            self.library.check_free(name)
            store = self.verifier.store
            assert store is not None
            copy = await asyncio.to_thread(store.put, name, files[CONFIG_NAME], files[WEIGHTS_NAME])
            try:
                # Before the folder is touched: a refused upload changes nothing.
                entry = await asyncio.to_thread(self.verifier.examine_copy, copy)
                await self.residency.prepare(entry)
                await asyncio.to_thread(write_folder, root / name, files)
            finally:
                await self.retirement.drop(name, copy)
            entry = await asyncio.to_thread(self.verifier.examine, root / name)
            return await self._publisher.publish(entry, "upload")

    @_counting_refusals
    async def push(
        self, name: str, body: bytes, basis: str | None = None, magnorm: str | None = None
    ) -> Version:
        """Serve new U on the basis of the version that ``name`` stands for.

        The adapters folder stays as it is; the version is kept in the store and outlives a restart.

        Args:
            body: a safetensors file with ``secura_U`` of every module.
            basis, magnorm: what the sender trained on and with, if it says so; see
                :func:`with_new_cores`.

        Raises:
            LifecycleError: (404) no such adapter; (409) another basis; (400) unreadable.
            SecuraError: it cannot be served; what was served before still is.
        """
        async with self._locks[name]:
            serving = self.library.record(name).serving
            if serving is None or serving.entry.adapter is None:
                raise LifecycleError(409, f"{name} is no CUR adapter that can take new weights")
            store = self.verifier.store
            assert store is not None
            config, weights = await asyncio.to_thread(with_new_cores, serving, body, basis, magnorm)
            copy = await asyncio.to_thread(store.put, name, config, weights)
            try:
                entry = await asyncio.to_thread(self.verifier.examine_copy, copy)
                return await self._publisher.publish(entry, "push")
            except SecuraError:
                await self.retirement.drop(name, copy)
                raise

    async def remove(self, name: str) -> None:
        """Serve an adapter no longer; requests that run are finished.

        Raises:
            LifecycleError: (404) there is none of that name.
        """
        async with self._locks[name]:
            await self._remove(name)

    async def remove_if_gone(self, name: str) -> bool:
        """Serve an adapter no longer if its folder is not there; return whether it is not."""
        async with self._locks[name]:
            if self.root is None or os.path.lexists(self.root / name):
                return False
            if name in self.library.records:
                await self._remove(name)
            return True

    async def _remove(self, name: str) -> None:
        self.library.record(name)
        self._refuse_if_folded(name)
        aliases = ", ".join(self.library.aliases_of(name))
        versions = self.library.remove(name)
        self.retirement.retire(versions)
        await self._publisher.save()
        self.say(f"{name} is served no longer" + (f", nor its alias {aliases}" if aliases else ""))

    def is_folded(self, name: str) -> bool:
        """Return whether a name's weights are, or are about to be, those that the engine has."""
        return any(
            model == name or (version is not None and version.name == name)
            for model, version in self.folded()
        )

    def _refuse_if_folded(self, name: str) -> None:
        if self.is_folded(name):
            raise LifecycleError(
                409, f"{name} is folded into the weights; POST to /admin/unfold first"
            )

    async def delete(self, name: str) -> None:
        """Remove an adapter's folder, and serve the adapter no longer.

        Raises:
            LifecycleError: (404) there is none of that name.
            StorageError: the folder cannot be removed; it is served as before.
        """
        async with self._locks[name]:
            self.library.record(name)
            self._refuse_if_folded(name)
            # From here on it cannot be folded.
            self.library.deleting.add(name)
            try:
                if self.root is not None:
                    await asyncio.to_thread(remove_folder, self.root / name)
                await self._remove(name)
            finally:
                self.library.deleting.discard(name)

    async def rollback(self, name: str, digest: str | None) -> Version:
        """Let a name stand for an older version, see :meth:`Library.rollback`."""
        async with self._locks[name]:
            version = self.library.rollback(name, digest)
            await self._publisher.move_pin(name, self.library.record(name).versions)
            await self._publisher.save()
            self.say(f"{name} is {version} again")
            return version

    async def pin(self, name: str, pinned: bool) -> None:
        """Keep an adapter in a slot, whichever version its name stands for; or no longer.

        Raises:
            LifecycleError: (404) no such adapter; (409) it takes no slot, or none is free for it.
        """
        async with self._locks[name]:
            record = self.library.record(name)
            if record.serving is None or not record.serving.per_request:
                raise LifecycleError(409, f"{name} is not chosen per request, so it takes no slot")
            await self.residency.pin(record.serving, pinned)
            record.pinned = pinned
            self.library.changed(name)
            await self._publisher.save()

    async def set_alias(self, alias: str, target: str | None) -> None:
        """Let an alias stand for a model name; None forgets the alias.

        Raises:
            LifecycleError: (404) there is no such model or alias; (409) the alias is folded.
        """
        # An adapter of this name may just be on its way in.
        async with self._locks[alias]:
            self._refuse_if_folded(alias)
            if target is None:
                self.library.remove_alias(alias)
            else:
                self.library.set_alias(alias, target)
            await self._publisher.save()

    def preparation(self, model: str | None) -> Awaitable[str | None] | None:
        """Return what a request for ``model`` has to wait for before it may run, or None.

        Awaited, it gives None or why the adapter cannot be served after all.
        """
        if model is not None and self.mixes.means_mix(model):
            return self.mixes.preparation(model)
        known = model is not None and self.residency.workers is not None
        version = self.library.find(model) if model is not None and known else None
        if version is None or not version.per_request or self._answered_by_weights():
            return None
        return self.residency.preparation(version)

    def _answered_by_weights(self) -> bool:
        """Return whether an adapter is folded: only it is answered, and takes no slot."""
        return any(model is not None for model, _ in self.folded()[:1])

    def admit(self, model: str | None) -> AbstractContextManager[None]:
        """Return the context in which a request for ``model`` runs."""
        if model is not None and self.mixes.means_mix(model):
            return self.mixes.asked(model)
        version = self.library.find(model) if model else None
        if model is None or version is None or self._answered_by_weights():
            return nullcontext()
        return self.residency.admit(model, version)

    def refuse(self, version: Version, reason: str) -> None:
        """Serve a version no longer that a worker cannot serve."""
        record = self.library.records.get(version.name)
        if record is not None and version in record.versions:
            record.versions.remove(version)
            self.library.refuse(version.name, reason)
            self.observer.adapter_refused(UnservableError(reason))
            self.say(f"warning: {version} is not served: {reason}")

    # How it is done.

    def _root(self) -> Path:
        if self.root is None:
            raise LifecycleError(
                409, "this server was started without --adapters, so it can take none"
            )
        return self.root
