"""The folder of a run: its checkpoints, and which settings they belong to."""

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
from secura_serve.train.settings import TrainConfig

__all__ = ["TENSORS", "RunFolder", "is_main_process", "processes"]

TENSORS = "trained.safetensors"
"""What is trained, in a checkpoint."""
_RUN, _LOCK = "run.json", "lock"
# What may change between the parts of a run without changing its outcome.
_FREE: tuple[str, ...] = ("out", "overwrite", "run_dir", "resume", "save_steps", "device")
# What the digests of the data stand for.
_FREE += ("data", "eval_data", "tasks", "tasks_dir")


def is_main_process() -> bool:
    """Whether this is the one process of a launch that writes and speaks."""
    return int(os.environ.get("RANK", "0")) == 0


def processes() -> int:
    """How many processes train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


class RunFolder:
    """Where a run keeps its checkpoints: ``--run-dir``, or ``.NAME.run`` beside ``--out``.

    A checkpoint (``checkpoint-STEP``) holds the trained tensors themselves, the optimiser, the
    schedule and the random numbers: nothing of a frozen base.
    """

    def __init__(self, config: TrainConfig) -> None:
        out = Path(os.path.abspath(config.out))
        self.config = config
        self.path = Path(os.path.abspath(config.run_dir or out.parent / f".{out.name}.run"))
        self.damaged: list[str] = []
        """Newer checkpoints than the one that :meth:`open` found, with what is wrong with them."""

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep every other run out of the folder, which is made.

        Raises:
            ConfigError: another run is in it, or it cannot be written.
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
        """Return the checkpoint to go on from, if any; call it :meth:`locked`.

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
                self._clear()
        # Another process may be comparing the file with its own settings just now.
        if is_main_process() and (start is None or start.parent != self.path):
            try:
                (self.path / _RUN).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
            except OSError as error:
                raise self._unwritable(error) from error
        return start

    def _unwritable(self, error: OSError) -> ConfigError:
        return ConfigError(
            f"{self.path}, where checkpoints go, cannot be written: {error.strerror}; name another "
            "place with --run-dir"
        )

    def _clear(self) -> None:
        """Forget another run; the lock stays, because we hold it."""
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
            if lack := _lack(given, world_size):
                raise ConfigError(
                    f"--resume {given}: not a whole checkpoint of {world_size} processes: {lack}"
                )
            return given
        found = sorted(self.path.glob("checkpoint-*"), key=lambda p: int(p.name.rpartition("-")[2]))
        for checkpoint in reversed(found):
            if not (lack := _lack(checkpoint, world_size)):
                return checkpoint
            self.damaged.append(f"{checkpoint.name}: {lack}")
        return None

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


def _lack(folder: Path, world_size: int) -> str:
    """What a checkpoint lacks, or nothing: a kill or a power cut may leave any file of it short."""
    ranks = (
        ["rng_state.pth"] if world_size == 1 else [f"rng_state_{n}.pth" for n in range(world_size)]
    )
    try:
        json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
        with safe_open(folder / TENSORS, "pt"):
            pass
    except (OSError, ValueError, SafetensorError) as error:
        return str(error)
    # What torch saves is a zip file, whose table of contents stands at its end.
    short = [
        n for n in [*ranks, "optimizer.pt", "scheduler.pt"] if not zipfile.is_zipfile(folder / n)
    ]
    return f"{', '.join(short)} missing or not whole" if short else ""
