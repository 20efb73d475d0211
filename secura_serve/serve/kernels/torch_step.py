"""The adapter step: what a batch of mixed adapters adds to the output of one base linear.

y' = y + C·(U_i·(y − b)[rows]), i being each token's adapter. With y = W x + b, (y − b)[rows] is
R x: the shrink is a gather. C and ``rows`` are shared by all adapters, so that only the tiny
product with U_i differs between tokens and the expansion is one dense GEMM for the whole batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["adapter_step", "mix"]

# Above this many elements the per-token copies of U cost more than one pass per adapter.
_GATHER_LIMIT = 1 << 20


def mix(bank: Tensor, slots: Tensor, g: Tensor) -> Tensor:
    """Multiply each token's g by the U of its slot: ``h[t, s] = bank[slots[t], s] @ g[t, s]``.

    Args:
        bank: ``(n_slots + 1, n, r, r)``; the last slot is all zero and serves index −1.
        slots: ``(T,)`` int64.
        g: ``(T, n, r)``, for every token t and slice s.

    Returns:
        ``(T, n, r)`` in g's dtype; sums run in float32 at least.
    """
    tokens, n, r = g.shape
    if torch.compiler.is_compiling() or g.is_cuda:
        # Inductor fuses gather, product and sum; a CUDA graph allows no look at the values.
        return (bank[slots].float() * g.float().unsqueeze(-2)).sum(-1).to(g.dtype)
    if tokens * n * r * r <= _GATHER_LIMIT:
        return torch.matmul(bank[slots], g.unsqueeze(-1)).squeeze(-1)
    h = torch.zeros_like(g)
    for slot in slots.unique().tolist():
        if slot >= 0:
            where = (slots == slot).nonzero().squeeze(-1)
            # (n, t, r) @ (n, r, r)ᵀ: one GEMM per slice over all tokens of the adapter
            part = g[where].transpose(0, 1) @ bank[slot].transpose(-1, -2)
            h[where] = part.transpose(0, 1)
    return h


def adapter_step(y: Tensor, g: Tensor, slots: Tensor, *, bank: Tensor, C_t: Tensor) -> Tensor:
    """Return y + C·(U_i·g) as a new tensor; torch.compile can trace it.

    Args:
        y: ``(T, out)``, the base linear's output, bias included.
        g: ``(T, n·r)``, (y − b)[rows], slice by slice.
        slots: ``(T,)`` int64, each token's slot in ``bank``; −1 for none.
        bank: see :func:`mix`.
        C_t: ``(n·r, out)``, the transposed C of every slice, block-diagonal.
    """
    n, r = bank.shape[1], bank.shape[2]
    h = mix(bank, slots, g.view(-1, n, r)).view(-1, n * r)
    return torch.addmm(y, h, C_t)
