"""``EWC``: a penalty on moving the parameters that earlier tasks depend on."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from secura_serve.train.continual.strategies.base import Strategy
from secura_serve.train.data import Batch, Collate, Collator, Rows
from secura_serve.train.loop.loss import answer_logits, summed_cross_entropy

if TYPE_CHECKING:
    from secura_serve.train.continual.config import SequenceConfig
    from secura_serve.train.methods.prepared import PreparedModel

__all__ = ["EWC", "fisher_diagonal"]


def fisher_diagonal(model: nn.Module, rows: Rows, collate: Collate) -> dict[str, Tensor]:
    """Return the diagonal of the empirical Fisher information of the trainable parameters.

    ``F_i = 1/N Σ_n (∂ log p(y_n|x_n) / ∂θ_i)²``: y_n is the answer of row n in the data, and its
    log-probability is the sum over its tokens. Dropout is off. One backward pass per row.

    Returns:
        name -> F, of the parameter's shape and dtype; all >= 0.
    """
    training, device = model.training, next(model.parameters()).device
    model.eval()
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for row in rows:
        batch = {key: value.to(device) for key, value in collate([row]).items()}
        loss = summed_cross_entropy(*answer_logits(model, batch))
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        for name, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                total[name] += gradient.square() / len(rows)
    model.train(training)
    return total


class EWC(Strategy):
    """Elastic weight consolidation: moving a parameter that earlier tasks depend on costs loss.

    The loss gets ``λ/2 Σ_k Σ_i F_ki (θ_i − θ*_ki)²``, where k runs over the finished tasks, θ*_k
    are the parameters after task k and F_k is the :func:`fisher_diagonal` of task k at θ*_k
    (Kirkpatrick et al., "Overcoming catastrophic forgetting in neural networks", arXiv 1612.00796,
    eq. 3). It is computed as ``λ/2 Σ_i F_i (θ_i − m_i)²`` with ``F = Σ_k F_k`` and
    ``m = Σ_k F_k θ*_k / F``, which differs from that sum by a constant only. So two tensors per
    parameter are kept, however many tasks there are.

    By the Laplace approximation, from which the penalty comes, λ would be (examples of task k) /
    (answer tokens of the new task), because the loss is a mean over tokens and log p is a sum over
    the tokens of one answer.
    """

    def __init__(
        self, model: nn.Module, collate: Collate, weight: float, samples: int, seed: int
    ) -> None:
        self.model, self.collate, self.weight = model, collate, weight
        self.samples, self.seed = samples, seed
        self.fisher: dict[str, Tensor] = {}
        self.centre: dict[str, Tensor] = {}
        self.extra_loss = self._penalty

    @classmethod
    def from_config(cls, config: SequenceConfig, prepared: PreparedModel) -> EWC:
        """Return the strategy with its settings of ``config``."""
        collate = Collator(prepared.tokenizer.pad_token_id)
        return cls(prepared.model, collate, config.ewc_lambda, config.ewc_samples, config.seed)

    def _penalty(self, model: nn.Module, batch: Batch, logits: Tensor) -> Tensor:
        now = dict(self.model.named_parameters())
        parts = [
            (F_i * (now[name] - self.centre[name]).square()).sum()
            for name, F_i in self.fisher.items()
        ]
        return self.weight / 2 * torch.stack(parts).sum() if parts else logits.new_zeros(())

    @torch.no_grad()
    def finish(self, new: Rows) -> None:
        """Add the Fisher information of the task, from a seeded sample of its rows."""
        chosen = random.Random(self.seed).sample(new, min(self.samples, len(new)))
        with torch.enable_grad():
            fisher = fisher_diagonal(self.model, chosen, self.collate)
        now = dict(self.model.named_parameters())
        for name, F_k in fisher.items():
            before = self.fisher.get(name, torch.zeros_like(F_k))
            total = before + F_k
            pull = before * self.centre.get(name, now[name]) + F_k * now[name]
            self.centre[name] = torch.where(total > 0, pull / total, now[name])
            self.fisher[name] = total

    def tensors(self) -> dict[str, Tensor]:
        """Return F and m of each parameter."""
        parts = {"fisher": self.fisher, "centre": self.centre}
        return {f"{part}.{n}": t for part, named in parts.items() for n, t in named.items()}

    def load(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Put F and m back."""
        device = next(self.model.parameters()).device
        for key, value in tensors.items():
            part, _, name = key.partition(".")
            getattr(self, part)[name] = value.to(device)
