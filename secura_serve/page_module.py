"""Where the chat page is: the folder ``demo`` of a checkout, ``secura_serve_demo`` once installed.

It is a package of its own, which talks HTTP and shares only the command line with this one.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

__all__ = ["CHECKOUT", "IN_CHECKOUT", "page_module"]

CHECKOUT = Path(__file__).resolve().parents[1]
IN_CHECKOUT = "demo.app"
_INSTALLED = "secura_serve_demo"


def page_module() -> str | None:
    """Return the module that runs the page, or None if it is not installed."""
    if (CHECKOUT / "demo" / "app.py").is_file():
        return IN_CHECKOUT
    return f"{_INSTALLED}.app" if importlib.util.find_spec(_INSTALLED) is not None else None
