"""Addresses that a flag may name: the URL of a server, and a port."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

__all__ = ["port_problem", "url_problem"]


def url_problem(url: str) -> str | None:
    """Return what is wrong with the URL of a server, or None."""
    try:
        parts = urlsplit(url)
        known = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        known = False
    if known and not re.search(r"\s", url):
        return None
    return f"got {url!r}, must be a URL like http://127.0.0.1:8000"


def port_problem(port: int | str) -> str | None:
    """Return what is wrong with the number of a port, or None."""
    fine = str(port).isdecimal() and 0 < int(port) < 2**16
    return None if fine else f"got {port}, must be 1 to 65535"
