"""The progress bar of a run."""

from __future__ import annotations

import time
from typing import Any

from transformers import ProgressCallback

__all__ = ["Progress"]


class Progress(ProgressCallback):
    """The Trainer's progress bar, with loss and tokens/s beside steps/s and the time left."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        self.loss, self.spent = "", 0.0
        self.tokens_before = state.num_input_tokens_seen
        if self.training_bar is not None:
            # A resumed run goes on counting, but its rate is that of its own steps.
            self.training_bar.initial = self.training_bar.n = state.global_step
            self.training_bar.unit = "step"
        self.current_step = state.global_step

    def close(self) -> None:
        """End the line of the bar, when an error ends the training."""
        if self.training_bar is not None:
            self.training_bar.close()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_step_begin(args, state, control, **kwargs)
        self.began = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.training_bar is not None:
            # Only the steps count, not the evaluations and checkpoints between them.
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
            if "retention" in logs:
                self.loss += f", retention {logs['retention']:.3g}"
        if "eval_loss" in logs and self.training_bar is not None:
            self.training_bar.write(
                f"step {state.global_step}: held-out loss {logs['eval_loss']:.4g}, "
                f"token accuracy {logs['eval_token_accuracy']:.4g}"
            )
