"""Which adapters a running server has, by name and version, and what a model name in a request
means. Holds no files and knows no engine.

A *version* is one verified content of an adapter, named by its digest. The plain name stands for
the newest version, or for the one that was rolled back to; ``name@digest`` stands for one version
exactly (six or more digits of its digest), and an alias for either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from secura_serve.adapter import check_name
from secura_serve.errors import ConfigError, LifecycleError
from secura_serve.serve.app.adapters.content.snapshots import Snapshot, placed_files
from secura_serve.serve.app.adapters.content.verifier import Entry
from secura_serve.suggest import did_you_mean

__all__ = ["KEPT_VERSIONS", "Library", "Origin", "Record", "Version", "split_version"]

KEPT_VERSIONS = 3
"""How many versions of an adapter stay, the one that serves included."""
_SHORTEST_DIGEST = 6

Origin = Literal["folder", "upload", "push"]
"""Where a version came from: the adapters folder, ``PUT /v1/adapters/NAME``, or a trainer's
``PUT /v1/adapters/NAME/weights``, which leaves the folder as it is."""


@dataclass(frozen=True, eq=False)
class Version:
    """One verified content of an adapter."""

    entry: Entry
    number: int
    """What vLLM knows it by (``lora_int_id``); no other version of this process has it."""
    origin: Origin
    created: float
    """Unix time in seconds at which it was first served."""
    card: Mapping[str, Any] = field(default_factory=dict)
    """What its files say of task and scores."""
    image: Path | None = None
    """Where its delta image is, or will be: it is asked per request from a place of the engine."""

    @property
    def name(self) -> str:
        return self.entry.name

    @property
    def snapshot(self) -> Snapshot:
        assert self.entry.snapshot is not None
        return self.entry.snapshot

    @property
    def digest(self) -> str:
        return self.snapshot.digest

    @property
    def per_request(self) -> bool:
        """Whether it can be chosen per request, beside others."""
        return self.entry.per_request or self.entry.lora is not None or self.image is not None

    @property
    def engine_path(self) -> Path:
        """The folder by which the engine knows its content."""
        return self.image or self.snapshot.path

    @property
    def foldable(self) -> bool:
        return self.entry.adapter is not None

    @property
    def engine_name(self) -> str:
        """What the engine calls it. vLLM takes two adapters of one name in a batch for one, so each
        version has a name of its own there."""
        return f"{self.name}@{self.digest}"

    def __str__(self) -> str:
        return f"{self.name}@{self.digest[:12]}"


@dataclass
class Record:
    """One adapter: its versions, newest first, and what was decided about it."""

    versions: list[Version] = field(default_factory=list)
    rolled_back_to: str | None = None
    """The digest that serves though it is not the newest."""
    pinned: bool = False
    refused: str | None = None
    """Why the newest content of its folder is not served."""
    on_disk: str | None = None
    """The digest that its folder had when it was last looked at; None: it has no folder."""
    placed: tuple[tuple[int, int], ...] = ()
    """Which files these were, see :func:`~.snapshots.placed_files`."""

    @property
    def serving(self) -> Version | None:
        """The version that the plain name stands for; None where there was never a good one."""
        for version in self.versions:
            if version.digest == self.rolled_back_to:
                return version
        return self.versions[0] if self.versions else None


def split_version(model: str) -> tuple[str, str | None]:
    """Return name and digest of ``name@digest``; the digest is None where there is none."""
    name, at, digest = model.partition("@")
    return name, digest if at else None


class Library:
    """All adapters of one server.

    Args:
        bases: what the base is called, which no adapter and no alias may be.
        keep: how many versions of an adapter stay.
        changed: called with the name of every adapter after something about it has changed.
    """

    def __init__(
        self,
        bases: Iterable[str],
        *,
        keep: int = KEPT_VERSIONS,
        changed: Callable[[str], None] = lambda name: None,
    ) -> None:
        self.bases, self.keep, self.changed = frozenset(bases), keep, changed
        self.records: dict[str, Record] = {}
        self.aliases: dict[str, str] = {}
        """Alias -> ``name`` or ``name@digest``."""
        self.deleting: set[str] = set()
        """Adapters whose folders are being removed, and which must not be folded meanwhile."""

    def __iter__(self) -> Iterator[Version]:
        """Yield the version of every adapter that its name stands for."""
        return (v for record in self.records.values() if (v := record.serving) is not None)

    def find(self, model: str) -> Version | None:
        """Return the version that a request's ``model`` stands for, or None."""
        name, digest = split_version(self.aliases.get(model, model))
        record = self.records.get(name)
        if record is None or digest is None:
            return record.serving if record else None
        if len(digest) < _SHORTEST_DIGEST:
            return None
        fits = [v for v in record.versions if v.digest.startswith(digest.lower())]
        return fits[0] if len(fits) == 1 else None

    def record(self, name: str) -> Record:
        """Return what is known of an adapter.

        Raises:
            LifecycleError: (404) there is none of that name.
        """
        if name not in self.records:
            hint = did_you_mean(name, self.records)
            raise LifecycleError(404, f"there is no adapter {name[:100]!r}{hint}")
        return self.records[name]

    def check_free(self, name: str) -> str:
        """Return ``name``; raise ConfigError if no adapter may be called so."""
        check_name(name)
        if name in self.bases:
            raise ConfigError(f"{name!r} is the base model's name; choose another")
        if name in self.aliases:
            raise ConfigError(f"{name!r} is an alias of {self.aliases[name]}; remove that first")
        return name

    def add(self, version: Version) -> list[Version]:
        """Make a version the newest of its adapter; return those that are kept no longer.

        A rollback is over with it. Content that a kept version has already becomes the newest
        under its old number.
        """
        record = self.records.setdefault(version.name, Record())
        if version.origin != "push":
            record.on_disk = version.digest
            record.placed = placed_files(version.snapshot.source)
        same = [v for v in record.versions if v.digest == version.digest]
        others = [v for v in record.versions if v.digest != version.digest]
        record.versions = [*(same or [version]), *others]
        record.rolled_back_to = record.refused = None
        retired = self.drop_old(version.name)
        self.changed(version.name)
        return retired

    def drop_old(self, name: str) -> list[Version]:
        """Drop and return the oldest versions that neither an alias nor the name stands for."""
        record = self.records.get(name, Record())
        held = {id(record.serving)}
        held |= {id(self.find(alias)) for alias in self.aliases}
        kept, retired = list[Version](), list[Version]()
        for version in record.versions:
            stays = len(kept) < self.keep or id(version) in held
            (kept if stays else retired).append(version)
        record.versions = kept
        return retired

    def refuse(self, name: str, reason: str) -> None:
        """Take note that what is in an adapter's folder now is not served, and why."""
        self.records.setdefault(name, Record()).refused = reason
        self.changed(name)

    def accept(self, name: str, digest: str) -> None:
        """Take note that an adapter's folder holds again what is kept of it: nothing is refused."""
        record = self.record(name)
        if record.refused is not None and digest in {v.digest for v in record.versions}:
            record.refused = None
            self.changed(name)

    def remove(self, name: str) -> list[Version]:
        """Forget an adapter with its aliases; return the versions that it had."""
        record = self.records.pop(name, Record())
        for alias in [a for a, t in self.aliases.items() if split_version(t)[0] == name]:
            del self.aliases[alias]
        self.changed(name)
        return record.versions

    def rollback(self, name: str, digest: str | None = None) -> Version:
        """Let the name stand for an older version: the one before, or the one of ``digest``.

        The next new content ends it. Rolling back to the newest version ends it as well.

        Raises:
            LifecycleError: (404) no such adapter or version; (409) none is older.
        """
        record = self.record(name)
        serving = record.serving
        if digest is None:
            at = record.versions.index(serving) + 1 if serving else 0
            if at >= len(record.versions):
                raise LifecycleError(409, f"{name} has no version older than the one that serves")
            version = record.versions[at]
        else:
            wanted = self.find(f"{name}@{digest}")
            if wanted is None:
                kept = ", ".join(v.digest for v in record.versions)
                raise LifecycleError(
                    404, f"{name} has no version {digest[:64]!r}; these are kept: {kept or 'none'}"
                )
            version = wanted
        newest = record.versions[0]
        record.rolled_back_to = None if version is newest else version.digest
        self.changed(name)
        return version

    def set_alias(self, alias: str, target: str) -> None:
        """Let ``alias`` stand for an adapter, or for one version of it.

        Raises:
            ConfigError: the alias is not allowed as a name, or is taken.
            LifecycleError: (404) the target does not exist.
        """
        check_name(alias)
        if alias in self.bases or self.records.get(alias, Record()).versions:
            raise ConfigError(f"{alias!r} is a model's name already; choose another alias")
        if target in self.aliases or self.find(target) is None:
            hint = did_you_mean(target, self.records)
            raise LifecycleError(
                404, f"there is no adapter {target[:100]!r} to give an alias{hint}"
            )
        self.aliases[alias] = target
        self.changed(alias)

    def remove_alias(self, alias: str) -> None:
        """Forget an alias. Raises LifecycleError (404) if there is none."""
        if self.aliases.pop(alias, None) is None:
            hint = did_you_mean(alias, self.aliases)
            raise LifecycleError(404, f"there is no alias {alias[:100]!r}{hint}")
        self.changed(alias)

    def aliases_of(self, name: str) -> dict[str, str]:
        """Return the aliases of an adapter and what each stands for."""
        return {a: t for a, t in self.aliases.items() if split_version(t)[0] == name}
