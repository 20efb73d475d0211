from __future__ import annotations

import hashlib
import os
import sys
from importlib.util import find_spec
from types import ModuleType


def _without_blake3() -> None:
    """Let the parts of ``benchmarks.gpu`` run without BLAKE3: no digest matters to them."""
    try:
        found = find_spec("blake3") is not None
    except ModuleNotFoundError:
        found = False
    if not found:
        module = ModuleType("blake3")
        module.blake3 = hashlib.blake2b  # type: ignore[attr-defined]
        sys.modules["blake3"] = module


if "SECURA_BENCH_PART" in os.environ:
    _without_blake3()
