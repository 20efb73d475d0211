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

from secura_serve.adapter import LARGEST_RMS
from secura_serve.checkpoint import Checkpoint
from secura_serve.errors import UnservableError
from secura_serve.merge.io.buffers import opened, read_tensor
from secura_serve.merge.io.layout import read_shard
from secura_serve.serve.app.adapters.content.snapshots import files_of

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
            UnservableError: it cannot be read, is of another architecture, differs from the base
                where requests cannot differ (the first such tensor is named), or so much that it
                would overflow.
        """
        try:
            return cls._load(path, base)
        except UnservableError:
            raise
        except Exception as error:
            # What a stranger's files do to the libraries that read them has no end of classes.
            raise UnservableError(f"{path.name} cannot be read as a checkpoint: {error}") from error

    @classmethod
    def _load(cls, path: Path, base: Checkpoint) -> FineTune:
        tuned = Checkpoint(path)
        if (reason := _other_model(base, tuned)) is not None:
            raise UnservableError(
                f"{path.name}: {reason}; a fine-tune of {base.path.name} may differ from it in the "
                "weights of its linears alone. Serve it as a base of its own"
            )
        size = sum((path / shard).stat().st_size for shard in tuned.shards())
        linears = set(base.linears())
        changed = {}
        own, others = _Tensors(tuned), _Tensors(base)
        for name in sorted({*own.names, *others.names}):
            pair = own(name), others(name)
            if pair[0] is None or pair[1] is None:
                who = base.path.name if pair[1] is None else path.name
                raise UnservableError(f"{path.name}: {name}: {who} has no such tensor")
            mine, theirs = pair[0], pair[1]
            if mine.shape != theirs.shape:
                raise UnservableError(
                    f"{path.name}: {name} is {tuple(mine.shape)}, the base's {tuple(theirs.shape)}"
                )
            wide = torch.promote_types(mine.dtype, theirs.dtype)
            if torch.equal(mine.to(wide), theirs.to(wide)):
                continue
            module = name.removesuffix(".weight")
            if module not in linears or not name.endswith(".weight"):
                raise UnservableError(
                    f"{path.name}: {name} differs from the base's. Only the weights of linears in "
                    "the layers can be a request's own; embeddings, norms and biases are those of "
                    "the base. Serve it as a base of its own"
                )
            rms = float((mine.double() - theirs.double()).square().mean().sqrt())
            if not rms <= LARGEST_RMS:
                raise UnservableError(
                    f"{path.name}: {name} holds NaN or Inf, or differs from the base's by "
                    f"{rms:.1e} in root mean square; more than {LARGEST_RMS:g} would overflow in "
                    "the engine"
                )
            changed[module] = base.shape(module)
        if not changed:
            raise UnservableError(f"{path.name}: it does not differ from {base.path.name}")
        # As updates_of yields them.
        return cls(path.name, {m: changed[m] for m in base.linears() if m in changed}, size)


class _Tensors:
    """A checkpoint's tensors by their names in the module tree, read and not mapped: a file that
    shrinks meanwhile is then an error, and not the end of this process.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.names = checkpoint.stored_names()
        self._where = {
            stored.name: (checkpoint.path / shard, stored)
            for shard in checkpoint.shards()
            for stored in read_shard(checkpoint.path / shard).tensors
        }

    def __call__(self, name: str) -> Tensor | None:
        """Return a tensor, or None. An ``lm_head`` that is not there is tied to the embeddings."""
        tied = [n for n in self.names if n.endswith(("embed_tokens.weight", "wte.weight"))]
        known = [name, *(tied if name == "lm_head.weight" else [])]
        found = next((self.names[n] for n in known if n in self.names), None)
        if found is None:
            return None
        file, stored = self._where[found]
        if stored.dtype is None:
            raise UnservableError(
                f"{file.parent.name}: {name} is stored as {stored.code}; only floats of 16 bits or "
                "more are served"
            )
        with opened(file) as descriptor:
            return read_tensor(descriptor, stored)


def is_fine_tune(path: Path) -> bool:
    """Return whether a folder holds a checkpoint, and no adapter."""
    return files_of(path)[0] == "config.json"


def updates_of(
    path: Path, base: Checkpoint, modules: Mapping[str, Any]
) -> Iterator[tuple[str, Tensor]]:
    """Yield module and D = W' − W ``(out, in)`` float32 of each of the modules, in their order."""
    own = _Tensors(Checkpoint(path))
    for module in modules:
        new = own(f"{module}.weight")
        assert new is not None
        folded = new.T if base.is_conv1d(module) else new
        yield module, folded.to(torch.float32) - base.weight(module).to(torch.float32)


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
        settings = AutoConfig.from_pretrained(checkpoint.path, trust_remote_code=False).to_dict()
    except (ValueError, KeyError, OSError):
        # A kind that this transformers does not know: compared as it stands.
        settings = checkpoint.config
    return json.loads(json.dumps(settings, default=str)) or {}
