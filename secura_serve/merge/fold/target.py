"""What is folded into one weight: which parts of which adapters, and C and R of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from secura_serve.adapter import gather_verified
from secura_serve.method import Basis

__all__ = ["Gathered", "Part", "Target", "gather_target"]


@dataclass(frozen=True)
class Part:
    """One adapter's share in a target: ``weight``·C·U·R."""

    adapter: str
    weight: float
    U: Tensor
    basis: Basis
    fingerprint: str
    """Of the weight that the adapter was trained on, see :mod:`secura_serve.adapter`."""
    rho_max: float | None = None


@dataclass(frozen=True)
class Target:
    """One tensor of the base that changes."""

    module: str
    parts: tuple[Part, ...]
    transposed: bool = False
    """The tensor is W as ``(in, out)``: GPT-2's Conv1D."""


class Gathered(NamedTuple):
    """C and R of every part of a target, for one shard."""

    C: tuple[Tensor, ...]
    """``(rows, r)`` each."""
    R: tuple[Tensor, ...]
    """``(r, columns)`` each."""

    def map(self, work: Callable[[Tensor], Tensor]) -> Gathered:
        """Return the same with ``work`` done to each tensor."""
        return Gathered(tuple(map(work, self.C)), tuple(map(work, self.R)))


def gather_target(
    tensor: Tensor, target: Target, *, checked: bool = False
) -> tuple[list[tuple[Tensor, Tensor]], list[str]]:
    """Return C and R of each part, and every reason not to fold into this tensor.

    Args:
        checked: its fingerprints are known to be right.
    """
    if tensor.ndim != 2:
        return [], [f"{target.module}: has {tensor.ndim} axes, a linear has 2"]
    W = tensor.T if target.transposed else tensor
    gathered, problems = [], []
    for part in target.parts:
        CR, problem = gather_verified(W, part.basis, part.fingerprint, compare=not checked)
        if CR is not None:
            gathered.append(CR)
        if problem is not None:
            problems.append(f"{part.adapter}: {target.module}: {problem}")
    return gathered, problems
