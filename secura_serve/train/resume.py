"""Resuming transformers' Trainer, and TRL's, to the last bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from transformers import TrainerCallback

from secura_serve.errors import TrainingError
from secura_serve.train.checkpoints import TENSORS
from secura_serve.train.methods import restore, save_kept

__all__ = ["ExactResume"]


class ExactResume(TrainerCallback):
    """Keeps U, or A, B and the running core, in the Trainer's checkpoints beside the adapter.

    The adapter's file alone, which PEFT makes, has them multiplied out: a resumed run starts from
    the same Δ, but with core ``ab`` from a new A. ``secura-train`` does not need this::

        trainer = SFTTrainer(..., callbacks=[ExactResume()])
        trainer.train(resume_from_checkpoint=True)

    Raises:
        TrainingError: the run is resumed from a checkpoint that was written without it.
    """

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            save_kept(kwargs["model"], _file(args, state))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.global_step:
            return
        if not (file := _file(args, state)).is_file():
            raise TrainingError(
                f"{file} is missing: the checkpoint was written without ExactResume"
            )
        restore(kwargs["model"], load_file(file))


def _file(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}" / TENSORS
