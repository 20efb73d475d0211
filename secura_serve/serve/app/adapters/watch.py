"""Follows the adapters folder: what appears or changes there is served, what goes is dropped.

Our own writers put a folder in place in one step, and its configuration names the digest of its
weights, so that it is known to be complete at once. A folder that another program copies file by
file is taken once nothing about it has changed for two seconds.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

from watchfiles import awatch

from secura_serve import adapter as adapters
from secura_serve.adapter.format import CONFIG_NAME, WEIGHTS_NAME
from secura_serve.errors import LifecycleError, SecuraError, StorageError
from secura_serve.serve.app.adapters.content.catalog import adapter_folders
from secura_serve.serve.app.adapters.content.snapshots import digest_of, placed_files, stamps_of
from secura_serve.serve.app.adapters.content.verifier import printable
from secura_serve.serve.app.adapters.library import Library, Version
from secura_serve.serve.app.adapters.updates import AdapterUpdates
from secura_serve.serve.app.observer import WatchEvent

__all__ = ["FolderWatch", "SETTLE_S"]

SETTLE_S = 2.0
"""How long a folder must stay as it is before it counts as complete, if it does not say so."""
_LOOK_S = 0.25
_DEBOUNCE_MS = 50
_ROOT_MS = 5000
_RETRY_S = 5.0
_PATIENCE_S = 600.0
_FULL_DISK_S = 30.0
"""When a copy that could not be written is tried again, at the soonest."""


class FolderWatch:
    """Keeps the library as the folder is.

    Args:
        root: the adapters folder.
        updates: what changes the library.
        say: tells the operator one line.
    """

    def __init__(self, root: Path, updates: AdapterUpdates, say: Callable[[str], None]) -> None:
        # watchfiles reports absolute paths, whatever it was given.
        self.root, self._updates, self._say = root.absolute(), updates, say
        self._library: Library = updates.library
        self._changed: set[str] = set()
        self._tasks: dict[str, asyncio.Task[None]] = {}

    async def run(self) -> None:
        """Follow the folder until cancelled."""
        while True:
            try:
                watched = self.root.stat()
                async for changes in awatch(
                    self.root,
                    watch_filter=None,
                    debounce=_DEBOUNCE_MS,
                    step=_DEBOUNCE_MS // 2,
                    rust_timeout=_ROOT_MS,
                    yield_on_timeout=True,
                    recursive=True,
                ):
                    self._note({self._name(path) for _, path in changes} - {""})
                    if not changes:
                        # The system drops events when too many come at once.
                        known = list(self._library.records)
                        self._note(set(await asyncio.to_thread(self._left_over, known)))
                    # Of a folder that was replaced by another nothing would be reported any more.
                    if not os.path.samestat(watched, self.root.stat()):
                        break
            except Exception as error:
                # The folder may come back, for instance when a share is mounted again. What
                # watchfiles raises, for a name that is no text for instance, is an ExceptionGroup.
                self._say(f"warning: {self.root} cannot be watched ({error}); trying again")
            await asyncio.sleep(_RETRY_S)
            # What changed meanwhile was not reported.
            with suppress(StorageError):
                self._note(await self._all_names())

    def _name(self, path: str) -> str:
        with suppress(ValueError):
            name, *_ = Path(path).relative_to(self.root).parts or ("",)
            return "" if name.startswith(".") else name
        return ""

    def _note(self, names: set[str]) -> None:
        for name in names:
            self._changed.add(name)
            if name not in self._tasks:
                self._tasks[name] = asyncio.ensure_future(self._follow(name))

    async def _follow(self, name: str) -> None:
        """Bring one adapter up to date, again if its folder changes meanwhile."""
        shown, told = printable(name), False
        try:
            while name in self._changed:
                self._changed.discard(name)
                begin = time.monotonic()
                try:
                    await self._count(self.sync(name))
                except StorageError as error:
                    # Once: what the error says is another each time, such as how much is free.
                    if not told:
                        self._say(
                            f"warning: {shown} is not served as its folder is now: {error}; it is "
                            "tried again until there is room"
                        )
                    told = True
                    # Nothing reports that the disk has room again. To compare a whole fine-tune
                    # takes long, and requests are answered meanwhile.
                    self._changed.add(name)
                    await asyncio.sleep(max(_FULL_DISK_S, 2 * (time.monotonic() - begin)))
                except SecuraError as error:
                    self._say(f"warning: {shown} is not served as its folder is now: {error}")
                    # If its folder is gone, it goes once it is unfolded.
                    while self._is_left_over(name) and self._updates.is_folded(name):
                        self._changed.add(name)
                        await asyncio.sleep(SETTLE_S)
                except Exception as error:
                    self._say(f"warning: {shown}: its folder cannot be followed: {error!r}")
        finally:
            del self._tasks[name]

    async def reload(self) -> dict[str, str]:
        """Compare the whole folder with what is served, and bring every adapter up to date.

        Returns:
            Name -> ``added``, ``updated``, ``removed`` or why it is refused; nothing of the others.
        """
        names = sorted(await self._all_names())
        changes = await asyncio.gather(
            *(self._count(self.sync(name)) for name in names), return_exceptions=True
        )
        outcome = {}
        for name, change in zip(names, changes, strict=True):
            if isinstance(change, BaseException) and not isinstance(change, SecuraError):
                raise change
            if change is not None:
                outcome[printable(name)] = str(change)
        return outcome

    async def _count(self, work: Awaitable[WatchEvent | None]) -> WatchEvent | None:
        """Await :meth:`sync`, and tell the observer what became of the change."""
        try:
            change = await work
        except SecuraError:
            self._updates.observer.folder_changed("refused")
            raise
        if change is not None:
            self._updates.observer.folder_changed(change)
        return change

    async def _all_names(self) -> set[str]:
        """Return what the folder holds, and what was served from it."""
        try:
            folders = await asyncio.to_thread(adapter_folders, self.root)
        except OSError as error:
            raise StorageError(f"{self.root} cannot be read ({error})") from error
        served = {n for n, r in self._library.records.items() if r.on_disk or r.refused}
        return served | {path.name for path in folders}

    async def sync(self, name: str) -> WatchEvent | None:
        """Serve what the folder of one adapter holds now.

        Returns:
            ``added``, ``updated`` or ``removed``; None if nothing has changed.

        Raises:
            SecuraError: it cannot be served; what was served before still is.
        """
        folder = self.root / name
        if not folder.is_dir() and not folder.is_symlink():
            return await self._gone(name)
        if await self._is_served(name) or not await self._settled(folder):
            # Nothing new; or it is gone or still changing, and the next event brings it back here.
            return None
        if await self._is_served(name):
            return None
        known = name in self._library.records
        await self._updates.from_folder(name)
        return "updated" if known else "added"

    async def _gone(self, name: str) -> WatchEvent | None:
        """Drop an adapter whose folder is not there, unless it comes back at once."""
        if not self._is_left_over(name):
            return None
        # Some put a new folder in the place of an old one in two steps.
        await asyncio.sleep(SETTLE_S)
        return "removed" if await self._updates.remove_if_gone(name) else None

    def _left_over(self, names: list[str]) -> list[str]:
        return [name for name in names if self._is_left_over(name)]

    def _is_left_over(self, name: str) -> bool:
        """Return whether an adapter came from a folder that is not there any more."""
        record = self._library.records.get(name)
        gone = not os.path.lexists(self.root / name)
        return gone and record is not None and bool(record.on_disk or record.refused)

    async def _is_served(self, name: str) -> bool:
        """Return whether the content of a folder is known, and no newer than what is served."""
        folder, record = self.root / name, self._library.records.get(name)
        try:
            digest = await asyncio.to_thread(digest_of, folder)
            placed = await asyncio.to_thread(placed_files, folder)
        except OSError:
            return False
        serving = record.serving if record is not None else None
        if record is None or serving is None or record.on_disk != digest:
            return False
        # Equal files that were placed anew, over a version that was pushed, are the newest. A copy
        # that somebody has removed is made again.
        newest = placed == record.placed or serving.digest == digest
        if not newest or not await asyncio.to_thread(self._has_copy, serving):
            return False
        self._library.accept(name, digest)
        return True

    def _has_copy(self, version: Version) -> bool:
        """Return whether the copy that is served is there; a fine-tune's is its delta image."""
        places, path = self._updates.residency.places, version.snapshot.path
        if version.entry.fine_tune is None or places is None:
            return path.is_dir()
        try:
            places.images.found(path)
        except StorageError:
            return False
        return True

    async def _settled(self, folder: Path) -> bool:
        """Wait until a folder is complete; False where it has gone meanwhile."""
        if await asyncio.to_thread(_says_complete, folder):
            return True
        seen, quiet = None, 0.0
        deadline = time.monotonic() + _PATIENCE_S
        while quiet < SETTLE_S:
            if time.monotonic() > deadline:
                raise LifecycleError(409, f"{printable(folder.name)} is still being written")
            if not os.path.lexists(folder):
                return False
            now = await asyncio.to_thread(_look, folder)
            quiet = quiet + _LOOK_S if now == seen else 0.0
            seen = now
            if quiet and await asyncio.to_thread(_says_complete, folder):
                return True
            await asyncio.sleep(_LOOK_S)
        if await asyncio.to_thread(_names_no_digest, folder):
            self._say(
                f"{folder.name} is served, as it has not changed for {SETTLE_S:g} s (its "
                "configuration has no weights_digest that would tell at once that it is complete)"
            )
        return True


def _look(folder: Path) -> object:
    """Return what must stay the same while a folder settles."""
    try:
        return stamps_of(folder)
    except OSError:
        with suppress(OSError):
            return sorted(os.listdir(folder))
        return None


def _says_complete(folder: Path) -> bool:
    """Return whether the folder's configuration names the weights that it holds."""
    try:
        config = adapters.load_config(folder)
        return config.weights_digest is not None and adapters.holds_its_weights(folder, config)
    except (SecuraError, OSError, ValueError):
        return False


def _names_no_digest(folder: Path) -> bool:
    complete = all((folder / name).is_file() for name in (CONFIG_NAME, WEIGHTS_NAME))
    try:
        return complete and adapters.load_config(folder).weights_digest is None
    except (SecuraError, OSError, ValueError):
        return complete
