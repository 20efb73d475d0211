"""Named entries that others can add to: an unknown name is an error, never a default."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TypeVar

from secura_serve.errors import ConfigError
from secura_serve.suggest import did_you_mean

__all__ = ["Registry"]

Entry = TypeVar("Entry")


class Registry(Mapping[str, Entry]):
    """Entries by name, in the order in which they were added."""

    def __init__(self, what: str) -> None:
        """Start an empty registry; ``what`` is what its error messages call an entry."""
        self._what = what
        self._entries: dict[str, Entry] = {}

    def add(self, name: str, entry: Entry) -> None:
        """Add an entry.

        Raises:
            ConfigError: the name is empty, not a string, or taken by another entry.
        """
        if not isinstance(name, str) or not name:
            raise ConfigError(
                f"the name of a {self._what} must be a non-empty string, got {name!r}"
            )
        if name in self._entries and self._entries[name] is not entry:
            raise ConfigError(
                f"the {self._what} {name!r} is registered already; choose another name"
            )
        self._entries[name] = entry

    def __getitem__(self, name: str) -> Entry:
        """Return the entry of that name.

        Raises:
            ConfigError: there is none; the message lists the allowed names and the nearest.
        """
        # A name comes from a file: it may be a list, which no dictionary can look up.
        if not isinstance(name, str) or name not in self._entries:
            allowed, hint = ", ".join(self._entries), did_you_mean(name, self._entries)
            raise ConfigError(f"unknown {self._what} {name!r}; allowed: {allowed}{hint}")
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def names(self) -> tuple[str, ...]:
        """Return all names, the built-in ones first."""
        return tuple(self._entries)
