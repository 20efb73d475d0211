"""How a mix is named between the API server and the workers: ``mix:[["PATH", 0.5], …]``.

It stands in the place of an adapter's path. vLLM hashes its prefix cache by it, so it holds the
paths of the parts, which name their contents, and the weights to the last bit.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

__all__ = ["is_mix_path", "mix_path", "split_mix_path"]

_SCHEME = "mix:"


def mix_path(parts: Iterable[tuple[str, float]]) -> str:
    """Return the path of the mix of these paths and weights, in this order."""
    return _SCHEME + json.dumps([[path, weight] for path, weight in parts], allow_nan=False)


def is_mix_path(path: str) -> bool:
    """Return whether a path is one of :func:`mix_path`; those of folders are absolute."""
    return path.startswith(_SCHEME)


def split_mix_path(path: str) -> list[tuple[str, float]]:
    """Return the paths and weights of a mix."""
    return [(str(part), float(weight)) for part, weight in json.loads(path[len(_SCHEME) :])]
