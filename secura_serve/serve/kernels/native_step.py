"""The adapter step on a CPU as one torch op, ``secura::step_``: ``native_step.cpp``.

The pure expression of :mod:`secura_serve.serve.kernels.torch_step` costs a compiled model several
small kernels and a GEMM per linear; the op costs one call, no memory, and nothing where no token
has an adapter.
It is compiled at first use, against torch's stable C interface. Where that fails (no compiler, an
older torch) the expression does the work; ``SECURA_NATIVE=0`` says so at once.
"""

from __future__ import annotations

import ctypes
import logging
import os
from functools import cache
from pathlib import Path

import torch

from secura_serve.compiled import FAILURES, HALF_PRECISION, compiled

__all__ = ["LANES", "is_supported", "pairs"]

log = logging.getLogger(__name__)

LANES = 16
"""The output index of U is padded to a multiple of this."""

_SOURCE = Path(__file__).with_suffix(".cpp")
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# torch 2.10 is the oldest that has what the source uses.
_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"


def is_supported(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether ``secura::step_`` was compiled and takes tensors of this kind."""
    return device.type == "cpu" and dtype in _DTYPES and _library() is not None


def pairs(dtype: torch.dtype) -> int:
    """Return how many numbers of the contracted index lie side by side in the bank and in C."""
    library = _library()
    assert library is not None
    return int(library.secura_step_pairs()) if dtype == torch.bfloat16 else 1


@cache
def _library() -> ctypes.CDLL | None:
    if os.environ.get("SECURA_NATIVE") == "0":
        return None
    root = Path(torch.__file__).parent
    flags = ("-std=c++20", "-O3", "-march=native", "-shared", "-fPIC", f"-I{root / 'include'}")
    links = (f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10")
    try:
        file = compiled(
            _SOURCE, (*flags, _ABI, f"-DMADE_FOR_{torch.__version__.translate(_NAME)}"),
            compiler="c++", links=links, headers=(HALF_PRECISION,),
        )  # fmt: skip
        torch.ops.load_library(str(file))
        library = ctypes.CDLL(str(file))
    except FAILURES as error:
        why = getattr(error, "stderr", None) or error
        log.warning(
            "no native adapter step, because no C++ compiler made it; adapters run in torch, which "
            "is slower: %s", why,
        )  # fmt: skip
        return None
    return library


_NAME = str.maketrans({".": "_", "+": "_"})
