"""What happens beside the steps of a run: the progress bar, and a Ctrl-C that loses nothing."""

from __future__ import annotations

import math
import signal
import time
from types import FrameType
from typing import Any

from transformers import ProgressCallback, TrainerCallback

from secura_serve.errors import TrainingError

__all__ = ["Divergence", "Interrupt", "Progress", "SamplerEpoch"]


class Progress(ProgressCallback):
    """The trainer's bar, with loss and tokens/s beside steps/s and the time that is left."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        self.loss, self.spent = "", 0.0
        self.tokens_before = state.num_input_tokens_seen
        if self.training_bar is not None:
            # A resumed run counts on, and its rate is that of its own steps.
            self.training_bar.initial = self.training_bar.n = state.global_step
            self.training_bar.unit = "step"
        self.current_step = state.global_step

    def close(self) -> None:
        """End the bar's line where an error ends the training."""
        if self.training_bar is not None:
            self.training_bar.close()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_step_begin(args, state, control, **kwargs)
        self.began = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.training_bar is not None:
            # Evaluations and checkpoints lie between the steps.
            self.spent += time.monotonic() - self.began
            seen = state.num_input_tokens_seen - self.tokens_before
            rate = seen / max(self.spent, 1e-9)
            self.training_bar.set_postfix_str(f"{rate:,.0f} tokens/s{self.loss}", refresh=False)
        super().on_step_end(args, state, control, **kwargs)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        logs = logs or {}
        if "loss" in logs:
            self.loss = f", loss {logs['loss']:.4g}"
        if "eval_loss" in logs and self.training_bar is not None:
            self.training_bar.write(
                f"step {state.global_step}: held-out loss {logs['eval_loss']:.4g}, "
                f"token accuracy {logs['eval_token_accuracy']:.4g}"
            )


class Divergence(TrainerCallback):
    """Ends a run at the first loss that is no number, before that becomes a checkpoint.

    Raises:
        TrainingError: naming the step.
    """

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        if not math.isfinite((logs or {}).get("loss", 0.0)):
            raise TrainingError(
                f"the loss of step {state.global_step} is {logs['loss']}: the training has "  # type: ignore[index]
                f"diverged. Lower --lr (now {args.learning_rate:g}) or lengthen --warmup"
            )


class Interrupt(TrainerCallback):
    """Ends a run after the current step, with a checkpoint, on Ctrl-C or SIGTERM.

    A second signal ends it at once. Signals reach the main thread of a process alone; elsewhere
    they keep their meaning.
    """

    def __init__(self) -> None:
        self.received = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._before[number] = signal.signal(number, self._note)
            except ValueError:
                break
        return self

    def __exit__(self, *raised: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            raise KeyboardInterrupt
        self.received = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.received:
            control.should_save = control.should_training_stop = True


class SamplerEpoch(TrainerCallback):
    """Tells the sampler the epoch, also where accelerate has wrapped it to skip batches."""

    def __init__(self) -> None:
        self.epoch = 0

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.epoch = int((state.epoch or 0) + 1e-6)
