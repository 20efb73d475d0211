"""``EWC``: parameters that earlier tasks depend on are held where they were."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from secura_serve.train.data import Batch, Collate, Rows
from secura_serve.train.loss import answer_logits, summed
from secura_serve.train.strategy import Strategy

__all__ = ["EWC", "fisher_diagonal"]


def fisher_diagonal(model: nn.Module, rows: Rows, collate: Collate) -> dict[str, Tensor]:
    """The diagonal of the empirical Fisher information of the trainable parameters.

    ``F_i = 1/N Σ_n (∂ log p(y_n|x_n) / ∂θ_i)²``: y_n is the answer of row n as it stands in the
    data, its log-probability the sum over its tokens; dropout is off. One backward pass a row.

    Returns:
        name -> F, of the parameter's shape and dtype; all >= 0.
    """
    training, device = model.training, next(model.parameters()).device
    model.eval()
    held = {name: p for name, p in model.named_parameters() if p.requires_grad}
    total = {name: torch.zeros_like(p) for name, p in held.items()}
    for row in rows:
        batch = {key: value.to(device) for key, value in collate([row]).items()}
        loss = summed(*answer_logits(model, batch))
        gradients = torch.autograd.grad(loss, list(held.values()), allow_unused=True)
        for name, gradient in zip(held, gradients, strict=True):
            if gradient is not None:
                total[name] += gradient.square() / len(rows)
    model.train(training)
    return total


class EWC(Strategy):
    """Elastic weight consolidation: parameters that earlier tasks depend on are held.

    The loss gets ``λ/2 Σ_k Σ_i F_ki (θ_i − θ*_ki)²``, k over the finished tasks, θ*_k the
    parameters after task k and F_k its :func:`fisher_diagonal` there (Kirkpatrick et al.,
    "Overcoming catastrophic forgetting in neural networks", arXiv 1612.00796, eq. 3). It is
    computed as ``λ/2 Σ_i F_i (θ_i − m_i)²`` with ``F = Σ_k F_k``, ``m = Σ_k F_k θ*_k / F``, which
    differs from that sum by a constant: two tensors per parameter, however many tasks.

    The Laplace approximation, from which the penalty comes, would give λ = (examples of task k) /
    (answer tokens of the new task): the loss is a mean over tokens, log p a sum over one answer's.
    """

    def __init__(
        self, model: nn.Module, collate: Collate, weight: float, samples: int, seed: int
    ) -> None:
        self.model, self.collate, self.weight = model, collate, weight
        self.samples, self.seed = samples, seed
        self.fisher: dict[str, Tensor] = {}
        self.centre: dict[str, Tensor] = {}
        self.extra_loss = self._penalty

    def _penalty(self, model: nn.Module, batch: Batch, logits: Tensor) -> Tensor:
        now = dict(self.model.named_parameters())
        parts = [
            (F_i * (now[name] - self.centre[name]).square()).sum()
            for name, F_i in self.fisher.items()
        ]
        return self.weight / 2 * torch.stack(parts).sum() if parts else logits.new_zeros(())

    @torch.no_grad()
    def finish(self, new: Rows) -> None:
        """Add the task's Fisher information, of a seeded sample of its rows."""
        chosen = random.Random(self.seed).sample(new, min(self.samples, len(new)))
        with torch.enable_grad():
            found = fisher_diagonal(self.model, chosen, self.collate)
        now = dict(self.model.named_parameters())
        for name, F_k in found.items():
            before = self.fisher.get(name, torch.zeros_like(F_k))
            total = before + F_k
            pull = before * self.centre.get(name, now[name]) + F_k * now[name]
            self.centre[name] = torch.where(total > 0, pull / total, now[name])
            self.fisher[name] = total

    def tensors(self) -> dict[str, Tensor]:
        """F and m of each parameter."""
        parts = {"fisher": self.fisher, "centre": self.centre}
        return {f"{part}.{n}": t for part, named in parts.items() for n, t in named.items()}

    def load(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """F and m as they were."""
        device = next(self.model.parameters()).device
        for key, value in tensors.items():
            part, _, name = key.partition(".")
            getattr(self, part)[name] = value.to(device)
