"""What a fold did to each 16-bit weight, in so few bits that they can stay in a GPU's memory.

``bounded`` moves W by τ|W| at most, which is a handful of the numbers that bfloat16 has there. A
journal holds, for each weight, how many: W' and the journal give W back to the last bit, without a
byte from anywhere else.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from secura_serve.method import MagNorm

__all__ = ["Journal", "journal_bits"]

# Significant bits, the one that is not stored included.
_PRECISION = {torch.bfloat16: 8, torch.float16: 11}


class Journal(NamedTuple):
    """The distances of one weight ``(out, in)``; what they are counts from is in its bits."""

    data: Tensor
    """``(out, in)`` int8, or with 4 bits ``(out, ⌈in/2⌉)`` uint8, the even columns below."""
    bits: int

    @classmethod
    def empty(cls, W: Tensor, bits: int) -> Journal:
        """Return one for a weight, on its device, nothing written yet."""
        out, width = W.shape
        shape, dtype = (
            ((out, width), torch.int8) if bits == 8 else ((out, -(-width // 2)), torch.uint8)
        )
        return cls(torch.empty(shape, dtype=dtype, device=W.device), bits)

    @staticmethod
    def nbytes(W: Tensor, bits: int) -> int:
        """Return the bytes that one for a weight takes."""
        return int(W.shape[0]) * (-(-int(W.shape[1]) * bits // 8))


def journal_bits(norm: MagNorm, dtype: torch.dtype) -> int:
    """Return how many bits hold what a norm does to any weight of a dtype: 4, 8, or 0 for none.

    A weight m·2ᵉ, 1 ≤ m < 2, with p bits has its neighbours 2ᵉ⁺¹⁻ᵖ apart, so that τ|W| is less than
    τ·2ᵖ of them; below 2ᵉ they are half as far apart, and there it is τ·2ᵖ for m = 1 and less for
    larger m (τ < ½). With the rounding W' is no more than τ·2ᵖ + ½ numbers away: 5 in bfloat16 for
    τ = 0.02. A fold checks it for every weight all the same.
    """
    if norm.mode != "bounded" or dtype not in _PRECISION or norm.tau >= 0.5:
        return 0
    most = norm.tau * 2 ** _PRECISION[dtype] + 0.5
    return next((bits for bits in (4, 8) if most < 2 ** (bits - 1)), 0)
