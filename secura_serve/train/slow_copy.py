"""``SlowCopy``: I-LoRA, replay with a slowly moving copy of what is trained."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from transformers import TrainerCallback

from secura_serve.train.data import IGNORE, Batch
from secura_serve.train.loss import answer_logits
from secura_serve.train.methods import kept_tensors
from secura_serve.train.replay import Replay

__all__ = ["SlowCopy"]


class SlowCopy(Replay):
    """I-LoRA: replay, and a slow copy of what is trained, which is evaluated and written.

    After each optimiser step ``slow = d·slow + (1 − d)·θ``; it starts as θ does and lives through
    all tasks. The loss gets ``γ · mean((z − z_slow)²)`` over the vocabulary and the answer tokens
    of the *replayed* rows of a batch, z the logits of the trained model and z_slow, without
    gradient and dropout, those of the slow one (Ren et al., "Analyzing and Reducing Catastrophic
    Forgetting in Parameter Efficient Tuning", arXiv 2402.18865, section 5; d = γ = 0.99 there).
    It takes whatever a method trains, LoRA or not. θ itself goes on from task to task.
    """

    def __init__(
        self, model: nn.Module, size: int, share: float, seed: int, decay: float, weight: float
    ) -> None:
        super().__init__(size, share, seed)
        self.model, self.decay, self.weight = model, decay, weight
        self.slow = {name: value.clone() for name, value in self._trained().items()}
        self.extra_loss = self._distance
        self.callbacks = (_AfterStep(self),)

    def _trained(self) -> dict[str, Tensor]:
        """Also the running core of ``--fusion-step``; not the indices."""
        held = kept_tensors(self.model).items()
        return {name: value.detach() for name, value in held if value.is_floating_point()}

    @torch.no_grad()
    def follow(self) -> None:
        """Draw the slow copy after the trained tensors, by one step."""
        for name, value in self._trained().items():
            # A running core is 0 until it is first written.
            slow = self.slow.setdefault(name, torch.zeros_like(value))
            slow.mul_(self.decay).add_(value, alpha=1 - self.decay)

    def _distance(self, model: nn.Module, batch: Batch, logits: Tensor) -> Tensor:
        marks = batch.get("replayed")
        if marks is None or not marks.any():
            return logits.new_zeros(())
        part = {key: value[marks] for key, value in batch.items()}
        training = self.model.training
        self.model.eval()
        with torch.no_grad():
            call = partial(_call, self.model, self.slow)
            theirs, wanted = answer_logits(self.model, part, call)
        self.model.train(training)
        # Rows end together, so those of shorter answers are the last columns.
        real = wanted != IGNORE
        ours = logits[marks][:, -wanted.shape[1] :][real]
        return self.weight * F.mse_loss(ours, theirs[real])

    def written(self) -> dict[str, Tensor]:
        """The slow copy."""
        return self.slow

    def tensors(self) -> dict[str, Tensor]:
        """The slow copy."""
        return self.slow

    def load(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Slow copy and buffer as they were."""
        super().load(tensors, facts)
        device = next(self.model.parameters()).device
        self.slow = {name: value.to(device) for name, value in tensors.items()}


def _call(model: nn.Module, tensors: dict[str, Tensor], **inputs: Any) -> Any:
    return functional_call(model, tensors, args=(), kwargs=inputs)


class _AfterStep(TrainerCallback):
    def __init__(self, copy: SlowCopy) -> None:
        self.copy = copy

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.copy.follow()
