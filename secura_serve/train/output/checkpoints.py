"""The folder of a run: its checkpoints, and the settings that they belong to."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open

from secura_serve.errors import ConfigError
from secura_serve.system.os_errors import described, reason
from secura_serve.train.settings import TrainConfig

__all__ = ["TENSORS", "RunFolder", "is_main_process", "processes"]

TENSORS = "trained.safetensors"
"""The file of a checkpoint with the trained tensors."""
_RUN, _LOCK = "run.json", "lock"
# Settings that a resumed run may change, because they do not change its outcome; those of the last
# line are compared by the content of the files.
_MAY_CHANGE = (
    *("out", "overwrite", "run_dir", "resume", "save_steps", "device"),
    *("push_to", "push_name", "push_every"),
    *("data", "eval_data", "basis", "retain_data", "tasks", "tasks_dir"),
)


def is_main_process() -> bool:
    """Return whether this is the process of a launch that writes files and messages."""
    return int(os.environ.get("RANK", "0")) == 0


def processes() -> int:
    """Return how many processes train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


class RunFolder:
    """The folder of a run's checkpoints: ``--run-dir``, or ``.NAME.run`` beside ``--out``.

    A checkpoint (``checkpoint-STEP``) holds the trained tensors, the optimiser, the schedule and
    the state of the random numbers, but nothing of a frozen base.
    """

    def __init__(self, config: TrainConfig) -> None:
        out = Path(os.path.abspath(config.out))
        self.config = config
        self.path = Path(os.path.abspath(config.run_dir or out.parent / f".{out.name}.run"))
        self.damaged: list[str] = []
        """The checkpoints newer than the one that :meth:`open` returned, with their faults."""

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Make the folder and keep every other run out of it for the length of the block.

        Raises:
            ConfigError: another run is at work in it, or it cannot be written.
        """
        if not is_main_process():
            yield
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.path / _LOCK, timeout=0)
            lock.acquire()
        except Timeout as error:
            raise ConfigError(
                f"another run is at work in {self.path}; wait for it, or choose another --out or "
                "--run-dir"
            ) from error
        except OSError as error:
            raise self._unwritable(error) from error
        try:
            yield
        finally:
            lock.release()

    def open(self, digests: Mapping[str, str | None], world_size: int = 1) -> Path | None:
        """Return the checkpoint to go on from, if any; call it inside :meth:`locked`.

        Args:
            digests: name of a data file -> SHA-256 of its content.
            world_size: number of processes.

        Raises:
            ConfigError: the folder holds a run with other settings, or an unfinished run and
                neither ``resume`` nor ``overwrite`` is given.
        """
        config = self.config
        facts = {k: v for k, v in asdict(config).items() if k not in _MAY_CHANGE}
        facts |= {f"content of {name}": value for name, value in digests.items()}
        facts["processes"] = world_size
        start = self._start(world_size)
        if start is not None:
            self._check_same_run(start.parent / _RUN, facts)
        elif self._unfinished() and not config.resume:
            if not config.overwrite:
                raise ConfigError(
                    f"{self.path} holds the checkpoints of an unfinished run; --resume auto goes "
                    "on with it, --overwrite deletes it"
                )
            if is_main_process():
                self._clear()
        # On --resume, another process may be reading the file at this moment.
        if is_main_process() and (start is None or start.parent != self.path):
            try:
                (self.path / _RUN).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
            except OSError as error:
                raise self._unwritable(error) from error
        return start

    def _unwritable(self, error: OSError) -> ConfigError:
        return ConfigError(
            f"{self.path}, where checkpoints go, cannot be written: {error.strerror}; name another "
            "folder with --run-dir"
        )

    def _clear(self) -> None:
        """Delete another run's files, except the lock, which we hold."""
        for entry in self.path.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
            elif entry.name != _LOCK:
                entry.unlink()

    def _unfinished(self) -> bool:
        return any(self.path.glob("checkpoint-*"))

    def _start(self, world_size: int) -> Path | None:
        if self.config.resume is None:
            return None
        if self.config.resume != "auto":
            given = Path(os.path.abspath(self.config.resume))
            if fault := _fault(given, world_size):
                raise ConfigError(
                    f"resume: {given} is no complete checkpoint of {world_size} processes: {fault}"
                )
            return given
        checkpoints = self.path.glob("checkpoint-*")
        for checkpoint in sorted(checkpoints, key=_step, reverse=True):
            if not (fault := _fault(checkpoint, world_size)):
                return checkpoint
            self.damaged.append(f"{checkpoint.name}: {fault}")
        return None

    def _check_same_run(self, file: Path, facts: dict[str, Any]) -> None:
        try:
            before = type(self.config).upgrade(json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError, AttributeError) as error:
            raise ConfigError(f"resume: {file} cannot be read: {reason(error)}") from error
        changed = [
            f"{key}: was {before.get(key)!r}, is {facts.get(key)!r}"
            for key in sorted((before.keys() | facts.keys()) - set(_MAY_CHANGE))
            if before.get(key) != facts.get(key)
        ]
        if changed:
            raise ConfigError("resume: the run was started with other settings:", changed)

    def close(self) -> None:
        """Remove the checkpoints of a finished run, unless ``--run-dir`` asked for them."""
        if self.config.run_dir is None and is_main_process():
            shutil.rmtree(self.path, ignore_errors=True)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _fault(folder: Path, world_size: int) -> str:
    """Return what is wrong with a checkpoint, or ""; a kill may leave any of its files short."""
    ranks = (
        ["rng_state.pth"] if world_size == 1 else [f"rng_state_{n}.pth" for n in range(world_size)]
    )
    try:
        json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
        with safe_open(folder / TENSORS, "pt"):
            pass
    except (OSError, ValueError, SafetensorError) as error:
        return described(error)
    # torch saves zip files; their table of contents is at the end, so a short file has none.
    short = [
        n for n in [*ranks, "optimizer.pt", "scheduler.pt"] if not zipfile.is_zipfile(folder / n)
    ]
    return f"{', '.join(short)} missing or incomplete" if short else ""
