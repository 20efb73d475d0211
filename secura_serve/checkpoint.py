"""A lazy reader of a transformers safetensors checkpoint: one tensor in memory at a time.

Needs safetensors, json and torch only, so merging and fingerprinting work without transformers.
Weights come as ``(out, in)`` whatever the file holds: GPT-2's Conv1D tensors are transposed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from secura_serve.errors import BaseModelError
from secura_serve.system.os_errors import reason

__all__ = ["Checkpoint"]

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_IN_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.\d+\.")
_CONV1D = re.compile(r"\.(?:c_attn|c_proj|c_fc)$")
# The *ForCausalLM* prefix that checkpoints saved from the bare model lack (all old GPT-2 ones do).
_PREFIX = dict.fromkeys(("llama", "qwen2", "gemma2", "mistral"), "model.") | {
    "gpt2": "transformer."
}


class Checkpoint:
    """The linear layers of one checkpoint folder, read on demand.

    Opening reads the headers of all shards and checks them; no weight is loaded.

    Raises:
        BaseModelError: with every fault in ``problems``: no or unreadable config.json, missing,
            truncated or foreign shards, tensors that the index promises but no shard holds, or
            weights in pickle form only.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._shards: dict[str, Any] = {}
        self._problems: list[str] = []
        self.config: dict[str, Any] = self._json("config.json")
        weight_map = self._open()
        if self._problems:
            raise BaseModelError(f"{self.path} cannot be read as a base model:", self._problems)
        prefix = _PREFIX.get(self.config.get("model_type", ""), "")
        if any(name.startswith(prefix) for name in weight_map):
            prefix = ""
        # Name in the module tree -> (name in the file, shard).
        self._entries = {
            name if name.startswith("lm_head.") else prefix + name: (name, shard)
            for name, shard in weight_map.items()
        }

    def linears(self) -> list[str]:
        """Return the modules with a 2-D weight inside the decoder layers, layer by layer.

        Embeddings, lm_head and norms are not among them. Names are those of the *ForCausalLM*
        module tree, for example ``model.layers.0.self_attn.q_proj``.
        """
        return list(self._linears)

    def shape(self, module: str) -> tuple[int, int]:
        """Return ``(out, in)`` of a linear, from the header alone.

        Raises:
            BaseModelError: no such linear.
        """
        name, shard = self._locate(module)
        first, second = self._shards[shard].get_slice(name).get_shape()
        return (second, first) if self.is_conv1d(module) else (first, second)

    def weight(self, module: str) -> torch.Tensor:
        """Return W of a linear, ``(out, in)``, contiguous, in the dtype of the file.

        Raises:
            BaseModelError: no such linear, or a quantised one.
        """
        name, shard = self._locate(module)
        stored: torch.Tensor = self._shards[shard].get_tensor(name)
        if not stored.is_floating_point() or stored.itemsize < 2:
            raise BaseModelError(
                f"{module} is stored as {stored.dtype}, a quantised weight; allowed are float16, "
                "bfloat16, float32 and float64. Use the unquantised checkpoint."
            )
        if self.is_conv1d(module):
            stored = stored.T
        # A copy: safetensors returns a mapping of the file, and every later read of the same
        # tensor would see what a caller changes in place.
        return stored.clone(memory_format=torch.contiguous_format)

    def bias(self, module: str) -> torch.Tensor | None:
        """Return the bias of a linear, ``(out,)``, or None.

        Raises:
            BaseModelError: no such linear.
        """
        self._locate(module)
        if (entry := self._entries.get(f"{module}.bias")) is None:
            return None
        stored: torch.Tensor = self._shards[entry[1]].get_tensor(entry[0])
        return stored.clone()

    def tensor_name(self, module: str) -> str:
        """Return what the file calls the weight of a linear (old GPT-2: without a prefix).

        Raises:
            BaseModelError: no such linear.
        """
        return self._locate(module)[0]

    def is_conv1d(self, module: str) -> bool:
        """Tell whether the file holds this weight as ``(in, out)``."""
        return self.config.get("model_type") == "gpt2" and _CONV1D.search(module) is not None

    def tensors(self, modules: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield name and tensor of each module's weight and bias, as the file has them.

        In the order of the files. A tensor is a view of the mapped file: do not write to it.

        Raises:
            BaseModelError: no such linear.
        """
        wanted: dict[str, set[str]] = {}
        for module in modules:
            self._locate(module)
            for key in (f"{module}.weight", f"{module}.bias"):
                if (entry := self._entries.get(key)) is not None:
                    wanted.setdefault(entry[1], set()).add(entry[0])
        for shard, handle in self._shards.items():
            for name in handle.keys():  # noqa: SIM118 - safe_open is not a mapping
                if name in wanted.get(shard, ()):
                    yield name, handle.get_tensor(name)

    def stored_names(self) -> dict[str, str]:
        """Return name in the *ForCausalLM* module tree -> name in the file, of every tensor."""
        return {name: stored for name, (stored, _) in self._entries.items()}

    def shards(self) -> dict[str, list[str]]:
        """Return file name -> the tensor names in it, in file order."""
        return {shard: list(handle.keys()) for shard, handle in self._shards.items()}

    @cached_property
    def _linears(self) -> list[str]:
        linears = [
            name.removesuffix(".weight")
            for name, (stored, shard) in self._entries.items()
            if name.endswith(".weight")
            and _IN_LAYER.search(name)
            and len(self._shards[shard].get_slice(stored).get_shape()) == 2
        ]
        # Numbers as numbers, so that layer 10 comes after layer 9.
        return sorted(
            linears, key=lambda m: [(int(p), "") if p.isdigit() else (-1, p) for p in m.split(".")]
        )

    def _locate(self, module: str) -> tuple[str, str]:
        if module not in self._linears:
            some = ", ".join(self._linears[:3])
            raise BaseModelError(
                f"{self.path} has no linear {module!r}; it has {len(self._linears)}, "
                f"such as {some}. See Checkpoint.linears()."
            )
        return self._entries[f"{module}.weight"]

    def _json(self, name: str) -> dict[str, Any]:
        try:
            value = json.loads((self.path / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            self._problems.append(f"{name} is missing: give the folder that holds it")
        except (OSError, ValueError) as error:
            self._problems.append(f"{name} cannot be read ({reason(error)}): fetch it again")
        else:
            if isinstance(value, dict):
                return value
            self._problems.append(f"{name} is not a JSON object: fetch it again")
        return {}

    def _open(self) -> dict[str, str]:
        """Open every shard and return tensor name -> file name; faults go to ``_problems``."""
        if (self.path / _SINGLE).is_file():
            return dict.fromkeys(self._keys(_SINGLE), _SINGLE)
        if not (self.path / _INDEX).is_file():
            pickles = sorted(p.name for p in self.path.glob("*.bin"))
            self._problems.append(
                f"weights only as pickle ({', '.join(pickles)}), which can run code when read: "
                "convert them with transformers' save_pretrained"
                if pickles
                else f"neither {_SINGLE} nor {_INDEX} is there: fetch the weights"
            )
            return {}
        weight_map = self._json(_INDEX).get("weight_map")
        if not isinstance(weight_map, dict):
            self._problems.append(f"{_INDEX} has no weight_map: fetch it again")
            return {}
        for shard in sorted({str(s) for s in weight_map.values()}):
            # An index is data from elsewhere: it must not name files outside the folder.
            if Path(shard).name != shard or not shard.endswith(".safetensors"):
                self._problems.append(f"{_INDEX} names {shard!r}, not a safetensors file here")
                continue
            promised = {t for t, s in weight_map.items() if s == shard}
            held = self._keys(shard)
            if held and (lost := sorted(promised - held)):
                self._problems.append(f"{shard} lacks {len(lost)} tensors, first {lost[0]}")
        return weight_map

    def _keys(self, shard: str) -> set[str]:
        try:
            handle = safe_open(self.path / shard, framework="pt")
        except FileNotFoundError:
            self._problems.append(f"{shard} is missing: fetch it again")
        except (OSError, SafetensorError) as error:
            self._problems.append(
                f"{shard} is truncated or damaged ({reason(error)}): fetch it again"
            )
        else:
            self._shards[shard] = handle
            return set(handle.keys())
        return set()
