"""``ILoRA``: replay, and a moving average of what is trained."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from transformers import TrainerCallback

from secura_serve.train.continual.strategies.er import Replay
from secura_serve.train.data import IGNORE, Batch
from secura_serve.train.loop.loss import answer_logits
from secura_serve.train.methods.tensors import checkpoint_tensors

if TYPE_CHECKING:
    from secura_serve.train.continual.config import SequenceConfig
    from secura_serve.train.methods.prepared import PreparedModel

__all__ = ["ILoRA"]


class ILoRA(Replay):
    """I-LoRA: replay, and a slow copy of what is trained, which is evaluated and written.

    After each optimiser step ``slow = d·slow + (1 − d)·θ``. The slow copy starts equal to θ and is
    kept through all tasks. The loss gets ``γ · mean((z − z_slow)²)`` over the vocabulary and the
    answer tokens of the *replayed* rows of a batch; z are the logits of the trained model, and
    z_slow those of the slow copy, without gradient and dropout (Ren et al., "Analyzing and Reducing
    Catastrophic Forgetting in Parameter Efficient Tuning", arXiv 2402.18865, section 5, where
    d = γ = 0.99). It works with every method, not LoRA alone. θ itself is trained on from task to
    task.
    """

    def __init__(
        self, model: nn.Module, size: int, share: float, seed: int, decay: float, weight: float
    ) -> None:
        super().__init__(size, share, seed)
        self.model, self.decay, self.weight = model, decay, weight
        self.slow = {name: value.clone() for name, value in self._trained().items()}
        self.extra_loss = self._distance
        self.callbacks = (_AfterStep(self),)

    @classmethod
    def from_config(cls, config: SequenceConfig, prepared: PreparedModel) -> ILoRA:
        """Return the strategy with its settings of ``config``."""
        c = config
        return cls(prepared.model, c.replay, c.replay_share, c.seed, c.ema_decay, c.consistency)

    def _trained(self) -> dict[str, Tensor]:
        """Return what is trained and the running core of ``--fusion-step``, without the indices."""
        tensors = checkpoint_tensors(self.model).items()
        return {name: value.detach() for name, value in tensors if value.is_floating_point()}

    @torch.no_grad()
    def follow(self) -> None:
        """Move the slow copy one step towards the trained tensors."""
        for name, value in self._trained().items():
            # A running core counts as 0 until it exists.
            slow = self.slow.setdefault(name, torch.zeros_like(value))
            slow.mul_(self.decay).add_(value, alpha=1 - self.decay)

    def _distance(self, model: nn.Module, batch: Batch, logits: Tensor) -> Tensor:
        replayed = batch.get("replayed")
        if replayed is None or not replayed.any():
            return logits.new_zeros(())
        part = {key: value[replayed] for key, value in batch.items()}
        training = self.model.training
        self.model.eval()
        with torch.no_grad():
            call = partial(_call, self.model, self.slow)
            theirs, wanted = answer_logits(self.model, part, call)
        self.model.train(training)
        # Rows are padded on the left, so the answers of these rows are in the last columns.
        real = wanted != IGNORE
        ours = logits[replayed][:, -wanted.shape[1] :][real]
        return self.weight * F.mse_loss(ours, theirs[real])

    def written(self) -> dict[str, Tensor]:
        """Return the slow copy."""
        return self.slow

    def tensors(self) -> dict[str, Tensor]:
        """Return the slow copy."""
        return self.slow

    def load(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Put the slow copy and the buffer back."""
        super().load(tensors, facts)
        device = next(self.model.parameters()).device
        self.slow = {name: value.to(device) for name, value in tensors.items()}


def _call(model: nn.Module, tensors: dict[str, Tensor], **inputs: Any) -> Any:
    return functional_call(model, tensors, args=(), kwargs=inputs)


class _AfterStep(TrainerCallback):
    def __init__(self, strategy: ILoRA) -> None:
        self.strategy = strategy

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.strategy.follow()
