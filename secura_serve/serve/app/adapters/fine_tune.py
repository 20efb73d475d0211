"""Whole fine-tunes of the base, served beside adapters: what must be the base's, and what changes.

A folder with a checkpoint in it (``config.json`` and safetensors, no ``adapter_config.json``) is a
fine-tune. Only weights of linears in the layers may differ from the base's; embeddings, norms,
biases and the configuration are shared by all requests of a batch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secura_serve.adapter.format import CONFIG_NAME
from secura_serve.checkpoint import Checkpoint
from secura_serve.errors import BaseModelError, UnservableError

__all__ = ["FineTune", "is_fine_tune", "updates_of"]

# What a checkpoint's configuration says that changes no output of the model.
_FREE = (
    *("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version"),
    *("use_cache", "bos_token_id", "eos_token_id", "pad_token_id", "tokenizer_class"),
)


@dataclass(frozen=True)
class FineTune:
    """W' = W + D in some linears of a base."""

    name: str
    modules: Mapping[str, tuple[int, int]]
    """The linears that differ, with their shapes (out, in)."""
    file_size: int
    """Bytes of the checkpoint's weights."""
    r = None

    @classmethod
    def load(cls, path: Path, base: Checkpoint) -> FineTune:
        """Compare a checkpoint with ``base``, tensor by tensor.

        Raises:
            UnservableError: it cannot be read, is of another architecture, or differs from the
                base where requests cannot differ; the first such tensor is named.
        """
        try:
            tuned = Checkpoint(path)
        except BaseModelError as error:
            raise UnservableError(f"{path.name}: {error}") from error
        if (reason := _other_model(base, tuned)) is not None:
            raise UnservableError(
                f"{path.name}: {reason}; a fine-tune of {base.path.name} may differ from it in the "
                "weights of its linears alone. Serve it as a base of its own"
            )
        size = sum((path / shard).stat().st_size for shard in tuned.shards())
        linears = set(base.linears())
        changed = {}
        for name, own, others in tuned.compared(base):
            wide = torch.promote_types(own.dtype, others.dtype)
            if torch.equal(own.to(wide), others.to(wide)):
                continue
            module = name.removesuffix(".weight")
            if module not in linears or not name.endswith(".weight"):
                raise UnservableError(
                    f"{path.name}: {name} differs from the base's. Only the weights of linears in "
                    "the layers can be a request's own; embeddings, norms and biases are those of "
                    "the base. Serve it as a base of its own"
                )
            if not torch.isfinite(own).all():
                raise UnservableError(f"{path.name}: {name} holds NaN or Inf")
            changed[module] = base.shape(module)
        if not changed:
            raise UnservableError(f"{path.name}: it does not differ from {base.path.name}")
        # As updates_of yields them.
        return cls(path.name, {m: changed[m] for m in base.linears() if m in changed}, size)


def is_fine_tune(path: Path) -> bool:
    """Return whether a folder holds a checkpoint, and no adapter."""
    if (path / CONFIG_NAME).exists() or not (path / "config.json").is_file():
        return False
    return any(path.glob("model*.safetensors"))


def updates_of(path: Path, base: Checkpoint, modules: Mapping[str, Any]) -> Iterator[Any]:
    """Yield module and D = W' − W ``(out, in)`` float32 of each of the modules, in their order."""
    tuned = Checkpoint(path)
    for module in modules:
        D: Tensor = tuned.weight(module).to(torch.float32)
        yield module, D - base.weight(module).to(torch.float32)


def _other_model(base: Checkpoint, tuned: Checkpoint) -> str | None:
    """Return in what the configurations differ; None if in nothing that matters."""
    ours, theirs = _settings(base), _settings(tuned)
    for key in sorted({*ours, *theirs}):
        if key not in _FREE and ours.get(key) != theirs.get(key):
            return f"its config.json has {key} {theirs.get(key)!r}, the base's {ours.get(key)!r}"
    return None


def _settings(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return a configuration with the defaults of its kind filled in."""
    from transformers import AutoConfig

    try:
        settings = AutoConfig.from_pretrained(checkpoint.path).to_dict()
    except (ValueError, KeyError, OSError):
        # A kind that this transformers does not know: compared as it stands.
        settings = checkpoint.config
    return json.loads(json.dumps(settings, default=str)) or {}
