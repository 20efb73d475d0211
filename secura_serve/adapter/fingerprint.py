"""The fingerprint of the rows and columns that an adapter uses: it tells one base from another."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from secura_serve.method import Basis, gather

__all__ = ["fingerprint", "fingerprint_of"]


def fingerprint(W: Tensor, basis: Basis) -> str:
    """Return 128 bits of SHA-256 over W's shape, the indices, C and R as little-endian float32.

    Values count and the stored dtype does not: a bfloat16 base and its exact float32 copy have
    the same fingerprint. Cost: ``r·(out + in)`` numbers read and hashed.

    Args:
        W: ``(out, in)``, pristine.
        basis: indices within W's shape.

    Returns:
        32 hexadecimal digits.
    """
    return fingerprint_of(*gather(W, basis), basis)


def fingerprint_of(C: Tensor, R: Tensor, basis: Basis) -> str:
    """Return :func:`fingerprint` of C ``(out, r)`` and R ``(r, in)`` that are gathered already."""
    digest = hashlib.sha256(f"secura-1|{C.shape[0]}x{R.shape[1]}|{basis.r}".encode())
    for part in (basis.rows.to(torch.int32), basis.cols.to(torch.int32)):
        digest.update(part.cpu().contiguous().numpy().astype("<i4").tobytes())
    for part in (C, R):
        digest.update(part.detach().cpu().to(torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()[:32]
