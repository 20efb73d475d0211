"""Which dtype a base is trained in where none is given: the one that the machine is faster with."""

from __future__ import annotations

from pathlib import Path

__all__ = ["fastest_dtype"]

CPU_INFO = Path("/proc/cpuinfo")
_MULTIPLIES_BFLOAT16 = {"amx_bf16", "bf16"}
"""What x86-64 and Arm call instructions that make bfloat16 faster than float32."""


def fastest_dtype(device: str) -> str:
    """Return ``bfloat16`` for a GPU, and for a CPU that has matrix instructions for it.

    Elsewhere ``float32``. AVX-512's bfloat16 does not count: torch 2.13 does 52 GFLOP/s with it on
    a core where float32 does 100, and ``secura-train`` on SmolLM2-135M 145 tokens/s instead of 303
    (Xeon without AMX).

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
    return "bfloat16" if words & _MULTIPLIES_BFLOAT16 else "float32"
