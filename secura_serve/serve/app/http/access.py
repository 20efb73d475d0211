"""The keys of the server, the login of its chat page, and what counts as this machine.

Needs nothing of vLLM.
"""

from __future__ import annotations

import re
from contextvars import ContextVar
from dataclasses import dataclass
from ipaddress import ip_address

from secura_serve.errors import ConfigError
from secura_serve.serve.app.http.key_file import FileKey, KeyFile

__all__ = [
    "ASKING_KEY",
    "Keys",
    "PageAccess",
    "check_key",
    "is_loopback",
    "is_loopback_host",
    "page_access",
]


ASKING_KEY: ContextVar[FileKey | None] = ContextVar("secura_asking_key", default=None)
"""The key of ``--keys`` that the current request came with, set by the guard. None: it came with
another key or without one, and may ask every model."""


# Without a repr: secrets must not show in a traceback.
@dataclass(frozen=True, repr=False)
class Keys:
    """The keys of the server."""

    user: tuple[str, ...] = ()
    """Those of ``--api-key``."""
    admin: str | None = None
    """The one of ``--admin-api-key``."""
    file: KeyFile | None = None
    """Those of ``--keys``."""
    internal: str | None = None
    """A random user key of this run, where there is a file: the chat page asks with it, and vLLM's
    own check, which knows no file, is shown it in the place of a key of the file."""

    @property
    def needed(self) -> bool:
        """Whether one has to have a key to ask."""
        return bool(self.user) or self.file is not None

    @property
    def plain(self) -> tuple[str, ...]:
        """Every key that is not in the file; with one of them all models may be asked."""
        return (*self.user, *(key for key in (self.admin, self.internal) if key is not None))


def check_key(key: str | None, source: str) -> str | None:
    """Return ``key``; None is no key.

    Raises:
        ConfigError: the key is empty, has blanks around it, or holds what cannot be sent in a
            header alike by all clients, so that it would protect nothing or never match.
    """
    if key and key == key.strip() and not (key.isascii() and key.isprintable()):
        raise ConfigError(f"the key of {source} holds other than printable ASCII; give another")
    if key is not None and (not key or key != key.strip()):
        what = "starts or ends with blanks" if key.strip() else "is empty"
        raise ConfigError(f"the key of {source} {what}; give a key, or leave {source} out")
    return key


def is_loopback(address: str) -> bool:
    """Return whether an IP address is one of this machine alone."""
    try:
        ip = ip_address(address)
    except ValueError:
        return False
    # A socket that listens on both families reports IPv4 callers so.
    return (getattr(ip, "ipv4_mapped", None) or ip).is_loopback


def is_loopback_host(host: str) -> bool:
    """Return whether a ``Host`` header (name, perhaps port) can only mean this machine."""
    parts = re.fullmatch(r"(\[[^\]]*\]|[^:\[\]]+)(:[0-9]{1,5})?", host)
    if parts is None:
        return False
    name = parts[1].lower().strip("[]")
    return name == "localhost" or is_loopback(name)


# Without a repr: secrets must not show in a traceback.
@dataclass(frozen=True, repr=False)
class PageAccess:
    """Where the chat page listens, and its login (``USER:PASSWORD``)."""

    host: str = "127.0.0.1"
    login: str | None = None
    open: bool = False
    """Everyone may have it without a login, under any name."""


def page_access(host: str | None, *, login: str | None, no_login: bool, keys: Keys) -> PageAccess:
    """Return how the chat page may be opened.

    The page asks the server with the server's own key. Whoever may open it has what that key gives.

    Args:
        host: where it is to listen; None is loopback.
        login: ``USER:PASSWORD``.
        no_login: the operator wants a page for everyone.
        keys: those of the server.

    Raises:
        ConfigError: the login is malformed, or strangers would reach a page without one.
    """
    page = PageAccess("127.0.0.1" if host is None else host, login, no_login)
    if login is not None:
        user, colon, password = login.partition(":")
        if not (user and colon and password):
            raise ConfigError(
                "--ui-auth (or SECURA_UI_AUTH) should be USER:PASSWORD, neither of them empty"
            )
        if no_login:
            raise ConfigError("--ui-auth and --ui-no-auth contradict each other; leave one out")
        return page
    if page.host == "localhost" or is_loopback(page.host):
        return page
    if keys.needed:
        raise ConfigError(
            f"--ui-host {page.host}: the chat page asks with the server's API key, and would lend "
            "it to whoever opens the page; give it a login with --ui-auth USER:PASSWORD (or "
            "SECURA_UI_AUTH), or leave --ui-host out"
        )
    if not no_login:
        raise ConfigError(
            f"--ui-host {page.host}: the chat page would be open to whoever reaches it; give it a "
            "login with --ui-auth USER:PASSWORD (or SECURA_UI_AUTH), or say that you want this "
            "with --ui-no-auth"
        )
    return page
