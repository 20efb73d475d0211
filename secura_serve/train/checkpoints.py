"""The folder of a run: its checkpoints, and which settings they belong to."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from secura_serve.errors import ConfigError
from secura_serve.train.settings import TrainConfig

__all__ = ["RunFolder", "is_main_process"]

_RUN = "run.json"
# What may change between the parts of a run without changing its outcome.
_FREE: tuple[str, ...] = ("out", "overwrite", "run_dir", "resume", "save_steps", "device")
# What the digests of the data stand for.
_FREE += ("data", "eval_data", "tasks", "tasks_dir")


def is_main_process() -> bool:
    """Whether this is the one process of a launch that writes and speaks."""
    return int(os.environ.get("RANK", "0")) == 0


class RunFolder:
    """Where a run keeps its checkpoints: ``--run-dir``, or ``.NAME.run`` beside ``--out``.

    A checkpoint (``checkpoint-STEP``) holds the trained tensors themselves, the optimiser, the
    schedule and the random numbers: nothing of a frozen base.
    """

    def __init__(self, config: TrainConfig) -> None:
        out = Path(os.path.abspath(config.out))
        self.config = config
        self.path = Path(os.path.abspath(config.run_dir or out.parent / f".{out.name}.run"))

    def open(self, digests: Mapping[str, str | None], world_size: int = 1) -> Path | None:
        """Make the folder and return the checkpoint to go on from, if any.

        Raises:
            ConfigError: it holds another run, or an unfinished one that nobody asked to resume.
        """
        config = self.config
        facts = {k: v for k, v in asdict(config).items() if k not in _FREE}
        facts |= {f"content of {name}": value for name, value in digests.items()}
        facts["processes"] = world_size
        start = self._start(world_size)
        if start is not None:
            self._same_run(start.parent / _RUN, facts)
        elif self._unfinished() and not config.resume:
            if not config.overwrite:
                raise ConfigError(
                    f"{self.path} holds the checkpoints of an unfinished run; --resume auto goes "
                    "on with it, --overwrite forgets it"
                )
            if is_main_process():
                shutil.rmtree(self.path)
        # Another process may be comparing the file with its own settings just now.
        if is_main_process() and (start is None or start.parent != self.path):
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                (self.path / _RUN).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
            except OSError as error:
                raise ConfigError(
                    f"{self.path}, where checkpoints go, cannot be written: {error.strerror}; "
                    "name another place with --run-dir"
                ) from error
        return start

    def _unfinished(self) -> bool:
        return any(self.path.glob("checkpoint-*"))

    def _start(self, world_size: int) -> Path | None:
        if self.config.resume is None:
            return None
        if self.config.resume != "auto":
            given = Path(os.path.abspath(self.config.resume))
            if not _whole(given, world_size):
                raise ConfigError(
                    f"--resume {given}: not a whole checkpoint of {world_size} processes"
                )
            return given
        found = [p for p in self.path.glob("checkpoint-*") if _whole(p, world_size)]
        return max(found, key=lambda p: int(p.name.rpartition("-")[2]), default=None)

    def _same_run(self, file: Path, facts: dict[str, Any]) -> None:
        try:
            before = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"--resume: {file} cannot be read: {error}") from error
        changed = [
            f"{key}: was {before.get(key)!r}, is {facts.get(key)!r}"
            for key in sorted(before.keys() | facts.keys())
            if before.get(key) != facts.get(key)
        ]
        if changed:
            raise ConfigError("--resume: the run was started with other settings:", changed)

    def close(self) -> None:
        """Remove the checkpoints of a finished run, unless ``--run-dir`` asked for them."""
        if self.config.run_dir is None and is_main_process():
            shutil.rmtree(self.path, ignore_errors=True)


def _whole(folder: Path, world_size: int) -> bool:
    """Whether a checkpoint was written to its end: the trainer's state comes last."""
    try:
        json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    states = (
        ["rng_state.pth"]
        if world_size == 1
        else [f"rng_state_{rank}.pth" for rank in range(world_size)]
    )
    return all((folder / name).is_file() for name in [*states, "optimizer.pt", "scheduler.pt"])
