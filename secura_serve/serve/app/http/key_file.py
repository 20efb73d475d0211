"""The file of ``--keys``: keys with a role, and the models that each may ask.

    [[keys]]
    name = "team-a"
    sha256 = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"
    role = "user"
    adapters = ["extract", "team-a-*"]

Holds hashes only. A plain SHA-256 protects keys that are long and random; whoever can guess a key
can also guess it from its hash. Needs nothing of vLLM.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import stat
import time
import tomllib
from collections.abc import Callable, Collection
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, get_args

from secura_serve.errors import ConfigError
from secura_serve.serve.logs import say
from secura_serve.system.os_errors import reason

__all__ = ["FileKey", "KeyFile", "Role", "parse_keys", "read_keys"]

Role = Literal["user", "admin"]
"""``user`` may ask the models that the key names; ``admin`` may ask all and change the server."""

_FIELDS = ("name", "sha256", "role", "adapters")
_EMPTY = hashlib.sha256(b"").hexdigest()
_LONGEST_NAME = 64
_REREAD_S = 1.0


# Without a repr, so that hashes do not show in a traceback.
@dataclass(frozen=True, repr=False)
class FileKey:
    """One entry of the file."""

    name: str
    """What logs call the key."""
    sha256: str
    """64 lower-case hex digits."""
    role: Role = "user"
    adapters: tuple[str, ...] = ("*",)
    """Shell patterns (``fnmatch``, case counts) of the model names that it may ask."""

    def allows(self, name: str) -> bool:
        """Return whether a plain model name fits one of the patterns."""
        return any(fnmatchcase(name, pattern) for pattern in self.adapters)


def read_keys(path: Path, taken: Collection[str] = ()) -> tuple[FileKey, ...]:
    """Return the keys of a file, see :func:`parse_keys`; ConfigError where it cannot be read."""
    return parse_keys(_read(path), str(path), taken)


def _read(path: Path) -> bytes:
    try:
        # A pipe would have the whole server wait for its other end.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise OSError("it is no regular file")
        return path.read_bytes()
    except (OSError, ValueError) as error:
        raise ConfigError(f"--keys {path}: the file cannot be read: {reason(error)}") from error


def parse_keys(content: bytes, source: str, taken: Collection[str] = ()) -> tuple[FileKey, ...]:
    """Return the keys that a file's content names.

    Args:
        content: TOML in UTF-8.
        source: what errors call the file.
        taken: keys that are given elsewhere and may ask everything.

    Raises:
        ConfigError: with every problem of the file. It is no TOML, has no key, or a key has a
            missing, unknown or wrong field, or the name or the hash of another one.
    """
    try:
        table = tomllib.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"--keys {source}: the file is not TOML in UTF-8: {error}") from error
    problems = [
        f"{field!r} is not known here; each key is a table [[keys]]"
        for field in table
        if field != "keys"
    ]
    entries = table.get("keys")
    if not isinstance(entries, list) or not entries:
        problems.append("there is no [[keys]] entry, so nobody could ask")
        entries = []
    keys: list[FileKey] = []
    elsewhere = {hashlib.sha256(key.encode()).hexdigest() for key in taken}
    for number, entry in enumerate(entries, 1):
        if not isinstance(entry, dict):
            problems.append(f"key {number} is not a table; begin it with [[keys]]")
            continue
        wrong = _problems(entry)
        shown = f"key {number}" if "name" in wrong else f"key {number} ({entry['name']})"
        problems += [f"{shown}: {problem}" for problem in wrong.values()]
        if wrong:
            continue
        key = FileKey(
            entry["name"],
            entry["sha256"].lower(),
            entry.get("role", "user"),
            tuple(entry.get("adapters", ["*"])),
        )
        for other in keys:
            if other.name == key.name:
                problems.append(f"{shown}: another key has this name already")
            if other.sha256 == key.sha256:
                problems.append(f"{shown}: sha256 is that of {other.name} as well; remove one")
        if key.sha256 in elsewhere:
            problems.append(
                f"{shown}: it is a key of --api-key or --admin-api-key as well, which may ask "
                "every model; give another one"
            )
        keys.append(key)
    if problems:
        raise ConfigError(f"--keys {source} is not valid:", problems)
    return tuple(keys)


def _problems(entry: dict[str, Any]) -> dict[str, str]:
    """Return what is wrong with one entry, by field."""
    wrong = {
        field: f"{field!r} is not a field of a key; the fields are {', '.join(_FIELDS)}"
        for field in entry
        if field not in _FIELDS
    }
    name, digest, role = entry.get("name"), entry.get("sha256"), entry.get("role", "user")
    if not isinstance(name, str) or not name.strip():
        wrong["name"] = "name is missing or empty; logs call the key by it"
    elif len(name) > _LONGEST_NAME or not name.isprintable():
        wrong["name"] = f"name must be up to {_LONGEST_NAME} printable characters"
    if not isinstance(digest, str) or len(digest) != 64 or not _is_hex(digest):
        wrong["sha256"] = (
            "sha256 must be the 64 hex digits of the key's SHA-256: printf %s KEY | sha256sum"
        )
    elif digest.lower() == _EMPTY:
        wrong["sha256"] = "sha256 is that of an empty key; was the variable that held the key set?"
    if not isinstance(role, str) or role not in get_args(Role):
        wrong["role"] = 'role must be "user" or "admin"'
    patterns = entry.get("adapters", ["*"])
    if not isinstance(patterns, list) or not all(isinstance(p, str) and p for p in patterns):
        wrong["adapters"] = 'adapters must be a list of model names, like ["extract", "team-a-*"]'
    elif any("@" in pattern for pattern in patterns):
        wrong["adapters"] = "adapters are named without @VERSION; a name allows all its versions"
    elif role == "admin" and patterns != ["*"]:
        wrong["adapters"] = "an admin may ask every model; leave adapters out"
    return wrong


def _is_hex(text: str) -> bool:
    return all(character in "0123456789abcdefABCDEF" for character in text)


class KeyFile:
    """The keys of a file, read again when it changes.

    The file is read at most once a second, when a key is looked up, and its content compared: that
    also sees a replaced link (a Kubernetes secret) and a change within one tick of the clock. A
    file of a thousand keys takes 0.1 ms to read. A file that is damaged or gone leaves the keys as
    they were.

    Args:
        path: the file.
        taken: keys that are given elsewhere.
        say: tells the operator one line.
        clock: seconds that only ever grow.

    Raises:
        ConfigError: the file cannot be read or is not valid.
    """

    def __init__(
        self,
        path: Path,
        taken: Collection[str] = (),
        *,
        say: Callable[[str], None] = say,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.path, self._taken, self._say, self._clock = path, tuple(taken), say, clock
        self._content = _read(path)
        self._keys = {k.sha256: k for k in parse_keys(self._content, str(path), self._taken)}
        self._said: str | None = None
        self._looked = clock()
        self._warn_if_open()

    @property
    def keys(self) -> tuple[FileKey, ...]:
        """The keys that count now."""
        return tuple(self._keys.values())

    def find(self, token: bytes) -> FileKey | None:
        """Return the entry of the key that a request carries, or None."""
        self._refresh()
        digest = hashlib.sha256(token).hexdigest()
        key = self._keys.get(digest)
        return key if key is not None and hmac.compare_digest(key.sha256, digest) else None

    def _refresh(self) -> None:
        now = self._clock()
        if now - self._looked < _REREAD_S:
            return
        self._looked = now
        try:
            content = _read(self.path)
            if content == self._content and self._said is None:
                return
            keys = {k.sha256: k for k in parse_keys(content, str(self.path), self._taken)}
        except ConfigError as error:
            if str(error) != self._said:
                self._said = str(error)
                reason = " ".join(self._said.split())
                self._say(f"warning: the keys stay as they were: {reason}")
            return
        before, after = set(self._keys.values()), set(keys.values())
        self._content, self._keys, self._said = content, keys, None
        gone, new = ({key.name for key in some} for some in (before - after, after - before))
        kinds = {"added": new - gone, "removed": gone - new, "changed": gone & new}
        changes = [f"{kind} {', '.join(sorted(names))}" for kind, names in kinds.items() if names]
        self._say(f"read {self.path} again: {'; '.join(changes) or 'the same keys'}")
        self._warn_if_open()

    def _warn_if_open(self) -> None:
        try:
            mode = stat.S_IMODE(os.stat(self.path).st_mode)
        except OSError:
            return
        if mode & 0o077:
            self._say(
                f"warning: others on this machine have access to {self.path} (mode {mode:o}); "
                f"chmod 600 {self.path}"
            )
