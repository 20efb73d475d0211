"""What ends a run early, without loss: a diverging loss, Ctrl-C or SIGTERM."""

from __future__ import annotations

import math
import signal
from types import FrameType
from typing import Any

from transformers import TrainerCallback

from secura_serve.errors import TrainingError

__all__ = ["Divergence", "Interrupt"]


class Divergence(TrainerCallback):
    """Ends a run at the first loss that is NaN or infinite, before a checkpoint is written.

    Raises:
        TrainingError: naming the step.
    """

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        if not math.isfinite((logs or {}).get("loss", 0.0)):
            raise TrainingError(
                f"the loss of step {state.global_step} is {logs['loss']}: the training has "  # type: ignore[index]
                f"diverged. Lower --learning-rate (now "
                f"{args.learning_rate:g}) or raise --warmup-steps"
            )


class Interrupt(TrainerCallback):
    """Ends a run after the current step, with a checkpoint, on Ctrl-C or SIGTERM.

    A second signal ends it at once. Python delivers signals to the main thread only; in another
    thread this does nothing.
    """

    def __init__(self) -> None:
        self.received = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._before[number] = signal.signal(number, self._handle)
            except ValueError:
                break
        return self

    def __exit__(self, *raised: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            raise KeyboardInterrupt
        self.received = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.received:
            control.should_save = control.should_training_stop = True
