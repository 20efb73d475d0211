"""Plain LoRA on a CPU, beside CUR adapters: y += B_i·A_i·x, token by token's own adapter.

vLLM's own CPU path cannot be traced and (up to 0.32) gives tokens without an adapter the last
slot's. This is one opaque op for a linear: a GEMM pair per adapter in the batch, nothing for the
others. LoRA's cost grows with the number of adapters in a batch; that is what CUR avoids.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["step_"]


@torch.library.custom_op("secura_lora::step_", mutates_args=("y",))
def step_(
    y: Tensor, x: Tensor, slots: Tensor, plain: Tensor, A: list[Tensor], B: list[Tensor]
) -> None:
    """Add B_i·A_i·x of each token's own LoRA to ``y``, in place; B holds the scale.

    Args:
        y: ``(T, out)``, the outputs of n packed linears side by side.
        x: ``(T, in)``.
        slots: ``(T,)`` int64; −1 is none.
        plain: ``(slots + 1,)`` bool: which slots hold a LoRA.
        A: n times ``(slots, 1, r, in)``.
        B: n times ``(slots, 1, out_s, r)``.
    """
    for slot in slots[plain[slots]].unique().tolist():
        where = (slots == slot).nonzero().squeeze(-1)
        rows, start = x[where], 0
        for down, up in zip(A, B, strict=True):
            end = start + up.shape[2]
            y[where, start:end] += rows @ down[slot, 0].T @ up[slot, 0].T
            start = end
