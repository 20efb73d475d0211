"""The C++ sources of this room as torch ops, compiled at first use.

They are written against torch's stable C interface. Where compiling fails (no compiler, an older
torch) torch expressions do their work; ``SECURA_NATIVE=0`` says so at once.
"""

from __future__ import annotations

import ctypes
import logging
from functools import cache
from pathlib import Path

import torch

from secura_serve.system.compiled import FAILURES, HALF_PRECISION, compiled, native_is_wanted

__all__ = ["DTYPES", "native_library"]

log = logging.getLogger(__name__)

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""What the ops take."""

# torch 2.10 is the oldest that has what the sources use.
_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"
_NAME = str.maketrans({".": "_", "+": "_"})


@cache
def native_library(source: str) -> ctypes.CDLL | None:
    """Return the library of a source file of this folder, its ops registered with torch.

    Returns:
        None where it cannot be made, which is logged once.
    """
    if not native_is_wanted():
        return None
    root = Path(torch.__file__).parent
    flags = ("-std=c++20", "-O3", "-march=native", "-shared", "-fPIC", f"-I{root / 'include'}")
    links = (f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10")
    try:
        file = compiled(
            Path(__file__).with_name(source),
            (*flags, _ABI, f"-DMADE_FOR_{torch.__version__.translate(_NAME)}"),
            compiler="c++", links=links, headers=(HALF_PRECISION,),
        )  # fmt: skip
        torch.ops.load_library(str(file))
        library = ctypes.CDLL(str(file))
    except FAILURES as error:
        why = getattr(error, "stderr", None) or error
        log.warning(
            "%s cannot be used, because no C++ compiler made it; adapters run in torch, which is "
            "slower: %s", source, why,
        )  # fmt: skip
        return None
    return library
