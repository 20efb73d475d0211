"""A matrix in 8 bits: D ≈ diag(s)·Q, with Q int8 and one scale s for each row."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["dequantise_rows", "quantise_rows"]

_LARGEST = 127


def quantise_rows(D: Tensor) -> tuple[Tensor, Tensor]:
    """Return Q ``(out, in)`` int8 and s ``(out,)`` float32 with |D − diag(s)·Q| ≤ s/2.

    s_i = max_j |D_ij| / 127 and Q_ij = round(D_ij / s_i), to the nearest even. A row of zeros has
    s = 0. −128 is not used, so that −D has −Q.

    Args:
        D: ``(out, in)``, any floating dtype; finite.
    """
    wide = D.to(torch.float32)
    scale = wide.abs().amax(1) / _LARGEST
    # 0/0 where a row is zero, or so small that its scale is.
    Q = torch.where(scale[:, None] > 0, wide / scale[:, None], 0.0).round_()
    return Q.clamp_(-_LARGEST, _LARGEST).to(torch.int8), scale


def dequantise_rows(Q: Tensor, scale: Tensor) -> Tensor:
    """Return diag(s)·Q ``(out, in)`` in float32."""
    return Q.to(torch.float32) * scale[:, None]
