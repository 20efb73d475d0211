"""``ExactResume``: transformers' Trainer, and TRL's, go on from a checkpoint to the last bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from transformers import TrainerCallback

from secura_serve.errors import TrainingError
from secura_serve.train.methods.tensors import restore, save_checkpoint_tensors
from secura_serve.train.output.checkpoints import TENSORS

__all__ = ["ExactResume"]


class ExactResume(TrainerCallback):
    """Writes U, or A, B and the running core, into the Trainer's checkpoints beside the adapter.

    The adapter's file, which PEFT writes, holds only their product. A run that is resumed from it
    starts from the same Δ, but with core ``ab`` from a new A. ``secura-train`` does not need this::

        trainer = SFTTrainer(..., callbacks=[ExactResume()])
        trainer.train(resume_from_checkpoint=True)

    Raises:
        TrainingError: the run is resumed from a checkpoint that was written without this callback.
    """

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            save_checkpoint_tensors(kwargs["model"], _file(args, state))

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
