"""``Strategy``: what is done about forgetting while tasks are trained one after another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import TrainerCallback

from secura_serve.train.data import Rows
from secura_serve.train.loop.loss import ExtraLoss

if TYPE_CHECKING:
    from secura_serve.train.continual.config import SequenceConfig
    from secura_serve.train.methods.prepared import PreparedModel

__all__ = ["Strategy"]


class Strategy:
    """The base class: does nothing about forgetting.

    A strategy overrides what it does otherwise. :meth:`tensors` and :meth:`facts` are what the
    next task needs to know of the earlier ones; they are written after each task, and :meth:`load`
    takes them back when a stopped run goes on.
    """

    extra_loss: ExtraLoss | None = None
    """Added to the loss of each step."""
    callbacks: tuple[TrainerCallback, ...] = ()
    """Callbacks of the Trainer, in every task."""

    @classmethod
    def from_config(cls, config: SequenceConfig, prepared: PreparedModel) -> Strategy:
        """Return the strategy that the settings ask for, before its first task."""
        return cls()

    def rows(self, new: Rows) -> Rows:
        """Return the rows to train on for a task with the rows ``new``."""
        return new

    def finish(self, new: Rows) -> None:
        """Take note of a task that has been trained."""

    def written(self) -> dict[str, Tensor]:
        """Return tensors that replace the trained ones where the model is scored and written."""
        return {}

    def tensors(self) -> dict[str, Tensor]:
        """Return the state for :meth:`load`: tensors by name."""
        return {}

    def facts(self) -> dict[str, Any]:
        """Return the state for :meth:`load`: what fits into JSON."""
        return {}

    def load(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Take back what :meth:`tensors` and :meth:`facts` returned."""
