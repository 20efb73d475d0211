"""Which dtype a base is trained in where none is given: the one that the machine is faster with."""

from __future__ import annotations

from pathlib import Path

__all__ = ["fastest_dtype"]

CPU_INFO = Path("/proc/cpuinfo")
_MULTIPLIES_BFLOAT16 = ({"amx_bf16"}, {"bf16"}, {"AuthenticAMD", "avx512_bf16"})
"""What CPUs are called, or say that they have, that multiply bfloat16 faster than float32."""


def fastest_dtype(device: str) -> str:
    """Return ``bfloat16`` for a GPU, and for a CPU that multiplies it faster; else ``float32``.

    Intel's bfloat16 of AVX-512 does not count: with torch 2.13 a core of a Xeon without AMX does 52
    GFLOP/s in it and 100 in float32, and ``secura-train`` on SmolLM2-135M 145 and 303 tokens/s. AMD
    multiplies twice as many of it in an instruction; which is faster there was not measured.

    Args:
        device: ``auto``, which is a GPU where there is one, or ``cpu``.
    """
    if device == "auto":
        import torch

        if torch.cuda.is_available():
            return "bfloat16"
    try:
        words = set(CPU_INFO.read_text("utf-8").split())
    except OSError:
        return "float32"
    return "bfloat16" if any(needed <= words for needed in _MULTIPLIES_BFLOAT16) else "float32"
