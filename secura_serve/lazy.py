"""Public names of a package that load the module behind them on first use."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

__all__ = ["lazy"]


def lazy(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """Return a package's ``__getattr__``.

    Args:
        package: its ``__name__``.
        homes: public name -> module below the package, or ``module:name`` where the module calls
            it otherwise.

    Raises:
        AttributeError: (the function returned) a name that is not public.
    """

    def __getattr__(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module, _, there = homes[name].partition(":")
        value = getattr(import_module(f"{package}.{module}"), there or name)
        # Where a module has the name too, importing it has bound that, so bind the value anew.
        setattr(sys.modules[package], name, value)
        return value

    return __getattr__
