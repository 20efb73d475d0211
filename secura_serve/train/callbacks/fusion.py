"""``Fusion``: SECURA's fusion of A·B into a running core, as a callback of the Trainer."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from secura_serve.errors import ConfigError
from secura_serve.train.tuner import adapter_layers

__all__ = ["Fusion"]


class Fusion(TrainerCallback):
    """Calls :meth:`SecuraLayer.fuse` on every layer after each ``every`` optimiser steps.

    Fusing does not change the update, only how it is trained: the core after T windows is
    ``s·(Σ_t A_t·B_t + A·B)``. With ``every=1``, as in the paper, A never trains, because its
    gradient is ``dU·Bᵀ`` and B is 0 in every forward pass.

    Args:
        every: optimiser steps per window (SECURA's fusion step), at least 1.
        adapter: the name of an adapter with core ``ab``.

    Raises:
        ConfigError: ``every`` is less than 1; or, when training starts, there is no such adapter or
            it has no core ``ab``.
    """

    def __init__(self, every: int, adapter: str = "default") -> None:
        if every < 1:
            raise ConfigError(f"fusion step: got {every!r}, must be an integer >= 1")
        self.every, self.adapter = every, adapter

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Raise before the first step what :meth:`on_step_end` would raise after a window."""
        layers = adapter_layers(kwargs["model"], self.adapter).values()
        if not all(self.adapter in layer.secura_A for layer in layers) or not layers:
            raise ConfigError(f"fusion: adapter {self.adapter!r} is missing or has no core 'ab'")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Fuse, before a checkpoint of this step is written, so that it holds the fused state."""
        if state.global_step % self.every == 0:
            for layer in adapter_layers(kwargs["model"], self.adapter).values():
                layer.fuse(self.adapter)
