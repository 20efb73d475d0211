"""Which rows and columns of W an adapter uses, and reading them.

W is ``(out_features, in_features)`` everywhere; a caller transposes GPT-2's Conv1D weights first.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from secura_serve.errors import ConfigError
from secura_serve.method.ranking import Ranking
from secura_serve.method.rules import order_indices

__all__ = ["Basis", "columns", "gather", "importance", "select"]


# The norm of a row sums over dimension 1, that of a column over dimension 0.
_SUMMED = {"row": 1, "col": 0}


class Basis(NamedTuple):
    """The chosen ``rows`` and ``cols`` of W: int64, shape ``(r,)`` each, in order of choice."""

    rows: Tensor
    cols: Tensor

    @property
    def r(self) -> int:
        """The rank: how many rows and columns there are."""
        return len(self.rows)

    def prefix(self, r: int) -> Basis:
        """Return the first ``r`` rows and columns: the basis of rank ``r`` of the same seed."""
        return Basis(self.rows[:r], self.cols[:r])


def importance(W: Tensor, axis: str) -> np.ndarray:
    """Return the relative squared norms ``p_j = ‖w_j‖² / ‖W‖_F²``: CURLoRA (2408.14572), eq. 3.

    Args:
        W: ``(out, in)``, any floating dtype; the sums run in float64.
        axis: ``"row"`` for the ``out`` rows, ``"col"`` for the ``in`` columns.

    Returns:
        float32 of shape ``(out,)`` or ``(in,)``. The rounding hides the order of summation, so
        that every machine and every stored dtype of equal values ranks the indices alike.

    Raises:
        ConfigError: an unknown axis.
    """
    if axis not in _SUMMED:
        raise ConfigError(f"unknown axis {axis!r}; allowed: {', '.join(_SUMMED)}")
    squares = W.detach().to(torch.float64).square()
    p = squares.sum(dim=_SUMMED[axis]) / squares.sum()
    ranked: np.ndarray = p.to(torch.float32).cpu().numpy()
    return ranked


def select(
    W: Tensor,
    r: int,
    *,
    module: str,
    rule: str = "inverse_sampled",
    seed: int = 0,
    ranking: Ranking | None = None,
) -> Basis:
    """Choose ``r`` rows and ``r`` columns of W, the least important ones preferred.

    The order depends only on W, ``rule``, ``seed`` and ``module``, and rank r is its first r
    entries: adapters of one base and seed share their basis, and a smaller rank is a prefix of a
    larger one.

    Args:
        W: ``(out, in)``, pristine base weight.
        r: rank, at most the number of non-zero rows and of non-zero columns.
        module: checkpoint name of the tensor without ``.weight``.
        rule: a registered rule, see :mod:`secura_serve.method.rules`.
        seed: of the rules that draw.
        ranking: taken in place of ``rule`` and ``seed``.

    Raises:
        ConfigError: unknown rule, or r out of range.
    """
    if W.ndim != 2:
        raise ConfigError(f"{module}: W must be a matrix, got shape {tuple(W.shape)}")
    if ranking is not None:
        return _basis(*ranking.first(r, W.shape, module), W)
    chosen = {}
    for axis in _SUMMED:
        p = importance(W, axis)
        # All-zero weights give NaN here, too.
        if np.isnan(p).any() and not torch.isfinite(W).all():
            raise ConfigError(f"{module}: W holds NaN or Inf, so the checkpoint is damaged")
        usable = int(np.count_nonzero(p > 0))
        if not 1 <= r <= usable:
            raise ConfigError(
                f"{module}: rank {r} is not allowed; W of shape {tuple(W.shape)} has {usable} "
                f"non-zero {axis}s, so choose 1 <= r <= {usable}"
            )
        chosen[axis] = order_indices(p, rule, f"{seed}|{module}|{axis}")[:r]
    return _basis(chosen["row"], chosen["col"], W)


def _basis(rows: np.ndarray, cols: np.ndarray, W: Tensor) -> Basis:
    """Return indices as tensors on the device of W."""
    parts = (torch.from_numpy(part.astype(np.int64)).to(W.device) for part in (rows, cols))
    return Basis(*parts)


def columns(W: Tensor, cols: Tensor) -> Tensor:
    """Return ``C = W[:, cols]`` of shape ``(out, r)``."""
    return W.gather(1, cols.to(W.device, torch.int64).expand(W.shape[0], -1))


def gather(W: Tensor, basis: Basis) -> tuple[Tensor, Tensor]:
    """Return ``C = W[:, cols]``, ``(out, r)``, and ``R = W[rows, :]``, ``(r, in)``."""
    rows = basis.rows.to(W.device, torch.int64)
    return columns(W, basis.cols), W.index_select(0, rows)
