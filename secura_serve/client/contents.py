"""``Contents``: what is sent of an adapter, read from a model, from memory or from a folder."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from safetensors.torch import save as to_bytes

from secura_serve.adapter import Adapter, base_id, load, save
from secura_serve.adapter.format import CONFIG_NAME, WEIGHTS_NAME
from secura_serve.errors import AdapterFormatError
from secura_serve.system.os_errors import reason

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Contents", "read_contents"]

_EXTRAS = ("README.md", "train.json")


@dataclass(frozen=True)
class Contents:
    """One adapter, ready to be sent."""

    adapter: Adapter
    folder: Path | None = None
    """Where its files are, if it came from a folder."""

    @cached_property
    def basis(self) -> str:
        """The digest that says whether U alone can replace the U of another version."""
        return base_id(self.adapter)

    @cached_property
    def magnorm(self) -> str:
        """The S-MagNorm as JSON; it stays the server's when U alone is sent."""
        return json.dumps(self.adapter.config.magnorm.to_json(), sort_keys=True)

    def core(self) -> bytes:
        """Return a safetensors file with U of every module, and ``rho_max`` where there is one.

        A rank-32 adapter on all linears of SmolLM2-135M is 1 MB.
        """
        indices = (".secura_rows", ".secura_cols")
        named = (t for name, cur in self.adapter.modules.items() for t in cur.tensors(name).items())
        return to_bytes({key: tensor for key, tensor in named if not key.endswith(indices)})

    def files(self) -> dict[str, bytes]:
        """Return the files of the whole adapter, name -> content.

        Raises:
            AdapterFormatError: it is not well-formed, for instance because U holds NaN.
        """
        if self.folder is not None:
            names = (CONFIG_NAME, WEIGHTS_NAME, *(n for n in _EXTRAS if (self.folder / n).exists()))
            try:
                return {name: (self.folder / name).read_bytes() for name in names}
            except OSError as error:
                raise AdapterFormatError(
                    f"{self.folder} cannot be read: {reason(error)}"
                ) from error
        # Through the one writer of the format, so that there is no second one here.
        with TemporaryDirectory() as work:
            folder = save(Path(work) / "adapter", self.adapter.config, self.adapter.modules)
            return {name: (folder / name).read_bytes() for name in (CONFIG_NAME, WEIGHTS_NAME)}


def read_contents(
    model: nn.Module | Adapter | str | os.PathLike[str], adapter: str = "default"
) -> Contents:
    """Return what there is to send.

    Args:
        model: a PEFT model with a SECURA adapter, an :class:`Adapter`, or the folder of one.
        adapter: the adapter's name inside the model.

    Raises:
        AdapterFormatError: the folder does not hold a well-formed adapter.
        ConfigError: the model has no such adapter.
    """
    if isinstance(model, (str, os.PathLike)):
        loaded = load(model)
        return Contents(loaded, loaded.path)
    if isinstance(model, Adapter):
        held_back = any(cur.U.is_meta for cur in model.modules.values())
        return Contents(load(model.path) if held_back else model)
    # The tuner imports PEFT and transformers, which a folder does not need.
    from secura_serve.train.tuner import exported

    return Contents(Adapter(Path(adapter), *exported(model, adapter)))
