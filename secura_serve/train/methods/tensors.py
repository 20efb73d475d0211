"""The tensors that a checkpoint of a run holds, and how they are put back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from peft.tuners._buffer_dict import BufferDict
from safetensors.torch import save_file
from torch import Tensor, nn

from secura_serve.errors import ConfigError

__all__ = ["checkpoint_tensors", "restore", "save_checkpoint_tensors"]


def checkpoint_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return what a checkpoint must hold, by name: all that is trained or belongs to an adapter.

    The tensors of an adapter that get no gradient are its indices, and the running core of
    ``--fusion-step``.
    """
    prefix = getattr(getattr(model, "base_model", None), "prefix", None)
    parameters = {
        name: value
        for name, value in model.named_parameters()
        if value.requires_grad or (prefix and prefix in name)
    }
    buffers = {n: v for n, v in model.named_buffers() if prefix and prefix in n}
    return parameters | buffers


def save_checkpoint_tensors(model: nn.Module, file: Path) -> None:
    """Write :func:`checkpoint_tensors` as safetensors."""
    save_file({k: v.detach().contiguous() for k, v in checkpoint_tensors(model).items()}, file)


@torch.no_grad()
def restore(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put :func:`checkpoint_tensors` back. A running core exists from the first fusion on.

    Raises:
        ConfigError: they belong to another method or base.
    """
    current = checkpoint_tensors(model)
    tables = {n: m for n, m in model.named_modules() if isinstance(m, BufferDict)}
    for name in current.keys() ^ tensors.keys():
        table, _, leaf = name.rpartition(".")
        if table not in tables:
            raise ConfigError(f"the checkpoint belongs to another method or base: {name} differs")
        if name in current:
            del tables[table][leaf]
        else:
            tables[table][leaf] = tensors[name].to(next(model.parameters()).device, copy=True)
    for name in current.keys() & tensors.keys():
        current[name].copy_(tensors[name])
