"""``PreparedModel``: a base with the adapter of a method on it, ready to be trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from secura_serve.train.methods.registry import METHODS, Method
from secura_serve.train.settings import TrainConfig

__all__ = ["PreparedModel"]


@dataclass(frozen=True)
class PreparedModel:
    """A model that is ready to be trained, with the settings that it was made from."""

    model: Any
    """A ``PeftModel``; with method ``full`` the transformers model itself."""
    tokenizer: Any
    model_id: str
    config: TrainConfig

    @property
    def method(self) -> Method:
        """The method of ``config``."""
        return METHODS[self.config.method]

    @property
    def trainable_parameters(self) -> int:
        """How many numbers get a gradient."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)
