"""The keys of the server, and what counts as this machine. Needs nothing of vLLM."""

from __future__ import annotations

import re
from dataclasses import dataclass
from ipaddress import ip_address

from secura_serve.errors import ConfigError

__all__ = ["Keys", "check_key", "is_loopback", "is_loopback_host"]


@dataclass(frozen=True)
class Keys:
    """The keys of the server: those of ``--api-key``, and the one of ``--admin-api-key``."""

    user: tuple[str, ...] = ()
    admin: str | None = None


def check_key(key: str | None, source: str) -> str | None:
    """Return ``key``; None is no key.

    Raises:
        ConfigError: the key is empty or has blanks around it, so that it would protect nothing or
            never match.
    """
    if key is not None and (not key or key != key.strip()):
        what = "starts or ends with blanks" if key.strip() else "is empty"
        raise ConfigError(f"the key of {source} {what}; give a key, or leave {source} out")
    return key


def is_loopback(address: str) -> bool:
    """Whether an IP address is one of this machine alone."""
    try:
        ip = ip_address(address)
    except ValueError:
        return False
    # A socket that listens on both families reports IPv4 callers so.
    return (getattr(ip, "ipv4_mapped", None) or ip).is_loopback


def is_loopback_host(host: str) -> bool:
    """Whether a ``Host`` header (name and perhaps port) can only mean this machine."""
    parts = re.fullmatch(r"(\[[^\]]*\]|[^:\[\]]+)(:[0-9]{1,5})?", host)
    if parts is None:
        return False
    name = parts[1].lower().strip("[]")
    return name == "localhost" or is_loopback(name)
