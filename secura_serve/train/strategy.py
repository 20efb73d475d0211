"""``Strategy``: what is done about forgetting while tasks are trained one after another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import TrainerCallback

from secura_serve.train.data import Rows
from secura_serve.train.loss import ExtraLoss

__all__ = ["Strategy"]


class Strategy:
    """SEQ: each task starts where the last one ended, and nothing is done about forgetting.

    The others override what they do otherwise. :meth:`tensors` and :meth:`facts` are what the
    next task needs to know of the earlier ones; :meth:`load` takes them back.
    """

    extra_loss: ExtraLoss | None = None
    callbacks: tuple[TrainerCallback, ...] = ()

    def rows(self, new: Rows) -> Rows:
        """What is trained on for a task with the examples ``new``."""
        return new

    def finish(self, new: Rows) -> None:
        """Take note of a task that has been trained."""

    def written(self) -> dict[str, Tensor]:
        """Tensors that the evaluated and written model has in place of the trained ones."""
        return {}

    def tensors(self) -> dict[str, Tensor]:
        """State for :meth:`load`, by name."""
        return {}

    def facts(self) -> dict[str, Any]:
        """State for :meth:`load`, as JSON."""
        return {}

    def load(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Take back what :meth:`tensors` and :meth:`facts` gave."""
