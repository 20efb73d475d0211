"""The folder of a run over several tasks: the state after its last finished task."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from secura_serve.errors import ConfigError
from secura_serve.system.atomic import atomic_folder
from secura_serve.system.os_errors import described
from secura_serve.train.output.checkpoints import RunFolder

__all__ = ["StageFolder"]

_FACTS = "stage.json"


class StageFolder(RunFolder):
    """The folder of a run over several tasks, with one folder ``stage`` in it.

    ``stage`` is replaced as a whole after each task. A run that was killed goes on with the first
    unfinished task, from its beginning.
    """

    @property
    def stage(self) -> Path:
        """The folder of the state after the last finished task; it may not exist yet."""
        return self.path / "stage"

    def _unfinished(self) -> bool:
        return self.stage.exists()

    def _start(self, world_size: int) -> Path | None:
        return self.stage if self.config.resume and self._unfinished() else None

    def write(self, facts: Mapping[str, Any], **tensors: Mapping[str, Tensor]) -> None:
        """Replace the state by ``facts`` (JSON) and named collections of tensors."""
        with atomic_folder(self.stage) as new:
            for name, held in tensors.items():
                file = new / f"{name}.safetensors"
                save_file({k: v.detach().contiguous() for k, v in held.items()}, file)
            (new / _FACTS).write_text(json.dumps(facts), encoding="utf-8")

    def read(self) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
        """Return what :meth:`write` was given.

        Raises:
            ConfigError: the state is damaged.
        """
        try:
            facts = json.loads((self.stage / _FACTS).read_text(encoding="utf-8"))
            return facts, {f.stem: load_file(f) for f in self.stage.glob("*.safetensors")}
        except (OSError, ValueError, SafetensorError) as error:
            raise ConfigError(
                f"resume: {self.stage} is damaged ({described(error)}); --overwrite starts again"
            ) from error
