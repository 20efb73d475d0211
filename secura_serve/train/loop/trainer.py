"""transformers' Trainer with our loss, our order of the data and our checkpoints."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback, TrainerControl
from transformers.trainer_pt_utils import get_length_grouped_indices

from secura_serve.errors import TrainingError
from secura_serve.train.data import Collate, Rows
from secura_serve.train.loop.loss import ExtraLoss, answer_logits, score_rows, summed_cross_entropy
from secura_serve.train.methods.tensors import restore, save_checkpoint_tensors
from secura_serve.train.output.checkpoints import TENSORS

__all__ = ["AnswerTrainer"]


class _SamplerEpoch(TrainerCallback):
    """Tells the sampler the epoch, even when accelerate has wrapped it to skip batches."""

    def __init__(self) -> None:
        self.epoch = 0

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.epoch = int((state.epoch or 0) + 1e-6)


class _Order(Sampler[int]):
    """Shuffles the rows and groups them by length; the order depends on seed and epoch alone.

    So a resumed run sees the rest of its epoch, whatever random numbers were drawn before.
    """

    def __init__(self, rows: Rows, batch: int, seed: int, epoch: _SamplerEpoch) -> None:
        self.lengths = [len(row["input_ids"]) for row in rows]
        self.batch, self.seed, self.epoch = batch, seed, epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch.epoch)
        # torch's DataLoader draws one number first. Drawing it here keeps the order of the first
        # epoch, and so the outcome of recipes, as it was with torch's own generator.
        torch.empty((), dtype=torch.int64).random_(generator=generator)
        return iter(get_length_grouped_indices(self.lengths, self.batch, generator=generator))


class AnswerTrainer(Trainer):
    """transformers' Trainer; the loss is the mean over all answer tokens of an optimiser step."""

    loss_is_scaled_for_ga = True

    def __init__(self, *, padded: Collate, extra_loss: ExtraLoss | None, **options: Any) -> None:
        super().__init__(**options)
        # This makes the Trainer count the answer tokens of a step over its batches and processes.
        self.model_accepts_loss_kwargs = True
        self.padded, self.extra_loss = padded, extra_loss
        self.sampler_epoch = _SamplerEpoch()
        self.add_callback(self.sampler_epoch)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        args = self.args
        batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        return _Order(self.train_dataset, batch, args.seed, self.sampler_epoch)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        logits, wanted = answer_logits(model, inputs)
        assert num_items_in_batch is not None
        # The gradients of the processes are averaged, and the count is that of all of them.
        loss = summed_cross_entropy(logits, wanted) / num_items_in_batch * self.args.world_size
        if self.extra_loss is not None:
            extra = self.extra_loss(model, inputs, logits)
            loss = loss + extra / self.current_gradient_accumulation_steps
        return (loss, {}) if return_outputs else loss

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        metrics = {f"eval_{name}": value for name, value in self.held_out_scores().items()}
        self.log(dict(metrics))
        self.control: TrainerControl = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def held_out_scores(self) -> dict[str, float]:
        """Return the scores on the held-out rows; each process takes its share of them."""
        mine = self.eval_dataset[self.args.process_index :: self.args.world_size]

        def over_processes(total: Tensor) -> Tensor:
            # float64 does not exist on every device; the sums are small enough on the CPU.
            summed: Tensor = self.accelerator.reduce(total.to(self.args.device), "sum")
            return summed

        reduce = over_processes if self.args.world_size > 1 else lambda total: total
        return score_rows(self.model, mine, self.padded, self.args.eval_batch_size, reduce)

    # A checkpoint holds the trained tensors, not those of an adapter file: the file holds U
    # multiplied out, and a run needs A, B and the running core to go on.

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        try:
            super()._save_checkpoint(model, trial)
        # What safetensors, json and torch.save raise on a full disk.
        except (OSError, SafetensorError, RuntimeError) as error:
            full = shutil.disk_usage(self.args.output_dir).free < 2**20
            reason = "no space left" if full else str(error).partition("\n")[0]
            raise TrainingError(
                f"the checkpoint of step {self.state.global_step} could not be written to "
                f"{self.args.output_dir}: {reason}. Make room there or name another folder with "
                "--run-dir; --resume auto goes on from the last complete one"
            ) from error

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        save_checkpoint_tensors(self.model, folder / TENSORS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        restore(model or self.model, load_file(Path(resume_from_checkpoint) / TENSORS))

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)
