"""``PushCallback``: a running server gets the adapter while it is being trained."""

from __future__ import annotations

import warnings
from typing import Any

from transformers import TrainerCallback

from secura_serve.client import Pushed, check_target, push
from secura_serve.errors import AdapterError, ConfigError, PushError
from secura_serve.train.tuner import adapter_layers

__all__ = ["PushCallback"]


class PushCallback(TrainerCallback):
    """Makes the adapter the newest version of ``name`` in a server, every few optimiser steps.

    It works in transformers' Trainer and in TRL's trainers::

        trainer = GRPOTrainer(..., callbacks=[PushCallback("http://127.0.0.1:8000", "mine", 10)])

    Training waits for each push. With several processes the first one pushes, so every process
    must hold the whole adapter: data-parallel training does, sharded training does not.

    Args:
        endpoint, name, api_key, adapter, timeout: as of :func:`~secura_serve.client.push`.
        every_steps: optimiser steps between two pushes; 0 pushes at the end only. The end of the
            training always pushes what has not been pushed.
        on_error: ``warn`` goes on training when a push fails and counts it in ``failed``;
            ``raise`` ends the training.

    Raises:
        ConfigError: a setting is not allowed; or, when training starts, the model has no such
            adapter.
        PushError: (while training, with ``raise``) see :func:`~secura_serve.client.push`.
    """

    def __init__(
        self,
        endpoint: str,
        name: str,
        every_steps: int = 10,
        *,
        api_key: str | None = None,
        adapter: str = "default",
        on_error: str = "warn",
        timeout: float = 60.0,
    ) -> None:
        check_target(endpoint, name)
        if every_steps < 0:
            raise ConfigError(f"every_steps: got {every_steps}, must be >= 0")
        if on_error not in ("warn", "raise"):
            raise ConfigError(f"on_error: got {on_error!r}, allowed: warn, raise")
        self.endpoint, self.name, self.every_steps = endpoint, name, every_steps
        self.adapter, self.on_error = adapter, on_error
        self._api_key, self.timeout = api_key, timeout
        self.pushed = 0
        """Pushes that the server took."""
        self.failed = 0
        """Pushes that failed."""
        self.last: Pushed | None = None
        """The newest one that the server took."""
        self._served_step: int | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Raise before the first step if there is nothing to push."""
        if not adapter_layers(kwargs["model"], self.adapter):
            raise ConfigError(f"push: the model has no SECURA adapter {self.adapter!r}")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Push, where this step's turn has come."""
        if self.every_steps and state.global_step % self.every_steps == 0:
            self._push(kwargs["model"], state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Push the final adapter, and warn of pushes that failed."""
        # The best checkpoint has then been loaded, which is not that of the last step.
        if args.load_best_model_at_end or self._served_step != state.global_step:
            self._push(kwargs["model"], state)
        if self.failed:
            newest = self.last.digest if self.last else "none of this run"
            warnings.warn(
                f"{self.failed} of {self.failed + self.pushed} pushes of {self.name} to "
                f"{self.endpoint} failed; the newest version there is {newest}",
                stacklevel=2,
            )

    def _push(self, model: Any, state: Any) -> None:
        if not state.is_world_process_zero:
            return
        try:
            self.last = push(
                model,
                self.endpoint,
                self.name,
                api_key=self._api_key,
                adapter=self.adapter,
                timeout=self.timeout,
            )
        except (PushError, AdapterError) as error:
            if self.on_error == "raise":
                raise
            self.failed += 1
            warnings.warn(
                f"step {state.global_step} was not pushed, training goes on: {error}", stacklevel=2
            )
        else:
            self.pushed += 1
            self._served_step = state.global_step
