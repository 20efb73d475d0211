"""The adapter step on a CPU as one torch op, ``secura::step_``: ``native_step.cpp``.

The pure expression of :mod:`secura_serve.serve.kernels.torch_step` costs a compiled model several
small kernels and a GEMM per linear; the op costs one call, no memory, and nothing where no token
has an adapter.
"""

from __future__ import annotations

import torch

from secura_serve.serve.kernels.native_library import DTYPES, native_library

__all__ = ["LANES", "is_supported", "pairs"]

LANES = 16
"""The output index of U is padded to a multiple of this."""

_SOURCE = "native_step.cpp"


def is_supported(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether ``secura::step_`` was compiled and takes tensors of this kind."""
    return device.type == "cpu" and dtype in DTYPES and native_library(_SOURCE) is not None


def pairs(dtype: torch.dtype) -> int:
    """Return how many numbers of the contracted index lie side by side in the bank and in C."""
    library = native_library(_SOURCE)
    assert library is not None
    return int(library.secura_step_pairs()) if dtype == torch.bfloat16 else 1
