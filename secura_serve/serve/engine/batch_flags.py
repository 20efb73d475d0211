"""Which kinds of adapters a step's tokens have, as flags on the CPU.

A GPU kernel's op reads its flag before it launches anything, and torch.compile does not look into
ops. So a batch without adapters launches nothing, and neither does the CUDA graph that vLLM
captures for such batches.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

__all__ = ["CUR", "DELTA", "KINDS", "LORA", "BatchFlags"]

CUR, LORA, DELTA = "cur", "lora", "delta"
KINDS = (CUR, LORA, DELTA)


class BatchFlags:
    """One ``()`` bool for each kind. All are set until the first batch says otherwise."""

    def __init__(self) -> None:
        self.flags = {kind: torch.tensor(True) for kind in KINDS}

    def __getitem__(self, kind: str) -> torch.Tensor:
        """Return the flag of a kind: the same tensor for every batch."""
        return self.flags[kind]

    def set(self, kinds: Iterable[str]) -> None:
        """Say which kinds the next step has."""
        present = set(kinds)
        for kind, flag in self.flags.items():
            flag.fill_(kind in present)
