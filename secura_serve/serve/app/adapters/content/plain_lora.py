"""Plain PEFT LoRA folders, served beside ours: what can be checked before vLLM reads them."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from secura_serve.adapter import LARGEST_RMS
from secura_serve.adapter.format import CONFIG_NAME, WEIGHTS_NAME
from secura_serve.adapter.tensors import FLOATS
from secura_serve.checkpoint import Checkpoint
from secura_serve.errors import (
    AdapterFormatError,
    BaseModelError,
    StorageError,
    UnservableError,
)

__all__ = ["PlainLoRA"]

_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
_PEFT_ALPHA = 8  # PEFT's own default.
# What PEFT can add to a LoRA and vLLM does not serve, each with the value that leaves it out.
_EXTRAS: Mapping[str, tuple[Any, ...]] = {
    "use_dora": (None, False),
    "bias": (None, "none"),
    "lora_bias": (None, False),
    "modules_to_save": (None, []),
    "layer_replication": (None, []),
}


@dataclass(frozen=True)
class PlainLoRA:
    """ΔW = scale·B·A per linear, A ``(r, in)`` and B ``(out, r)``; vLLM loads it itself."""

    path: Path
    r: int
    """The largest rank that its config names."""
    modules: Mapping[str, int]
    """Module name -> rank."""

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.path.name

    @property
    def file_size(self) -> int:
        """Bytes of the weights file."""
        return (self.path / WEIGHTS_NAME).stat().st_size

    @classmethod
    def load(cls, path: Path, base: Checkpoint) -> PlainLoRA:
        """Check a folder against ``base``. A LoRA names no fingerprint: shapes and module names
        must fit, whether it was trained on this very base cannot be known.

        Raises:
            AdapterFormatError: with everything that is wrong with it.
            UnservableError: it is a kind of LoRA that vLLM does not serve.
        """
        raw = json.loads((path / CONFIG_NAME).read_text(encoding="utf-8"))
        odd = [k for k, fine in _EXTRAS.items() if raw.get(k) not in fine]
        if odd:
            raise UnservableError(
                f"{path.name}: a LoRA with {', '.join(odd)} is not served; merge it with PEFT"
            )
        weights = path / WEIGHTS_NAME
        if not weights.is_file():
            raise AdapterFormatError(
                f"{path.name}: {WEIGHTS_NAME} is missing; pickles (adapter_model.bin) are not read"
            )
        shapes: dict[str, dict[str, tuple[int, int]]] = {}
        norms: dict[str, float] = {}
        said, problems = _Ranks.read(raw), list[str]()
        try:
            with safe_open(weights, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118
                    match, tensor = _KEY.fullmatch(key), file.get_tensor(key)
                    if match is None or tensor.ndim != 2:
                        problems.append(f"tensor {key!r} is not part of a LoRA of linears")
                        continue
                    if tensor.dtype not in FLOATS:
                        problems.append(f"{key} is {tensor.dtype}; expected float")
                        continue
                    if not torch.isfinite(tensor).all():
                        problems.append(f"{key}: NaN or Inf")
                    shapes.setdefault(match["module"], {})[match["side"]] = tuple(tensor.shape)
                    norms[key] = float(torch.linalg.vector_norm(tensor.double()))
        except (OSError, SafetensorError) as error:
            raise AdapterFormatError(
                f"{path.name}: {WEIGHTS_NAME} is truncated or damaged: {error}"
            ) from error
        for module, sides in shapes.items():
            problems += (
                _misfits(module, sides, base)
                or said.misfits(module, sides["A"][0])
                or _oversized(module, sides, said, norms)
            )
        if problems or not shapes:
            raise AdapterFormatError(
                f"{path.name} does not fit {base.path.name}:", problems or ["no tensors"]
            )
        ranks = {module: sides["A"][0] for module, sides in shapes.items()}
        return cls(path, said.largest, ranks)

    def factors(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Yield module, scale·B ``(out, r)`` and A ``(r, in)``, float64.

        The scale is alpha / r, or alpha / √r with ``use_rslora``, alpha and r those of the module
        as PEFT's patterns have them.

        Raises:
            StorageError: the files cannot be read any more.
        """
        try:
            raw = json.loads((self.path / CONFIG_NAME).read_text(encoding="utf-8"))
            with safe_open(self.path / WEIGHTS_NAME, framework="pt") as file:
                for module, r in self.modules.items():
                    alpha = _of_pattern(raw.get("alpha_pattern") or {}, module)
                    if alpha is None:
                        alpha = raw.get("lora_alpha", _PEFT_ALPHA)
                    scale = alpha / (r**0.5 if raw.get("use_rslora") else r)
                    A, B = (
                        file.get_tensor(f"base_model.model.{module}.lora_{side}.weight").double()
                        for side in "AB"
                    )
                    yield module, scale * B, A
        except (OSError, ValueError, SafetensorError) as error:
            raise StorageError(f"{self.path} cannot be read: {error}") from error


@dataclass(frozen=True)
class _Ranks:
    """What ``adapter_config.json`` says of the ranks; vLLM sizes and scales by it."""

    r: int
    pattern: Mapping[str, int]
    alpha: float
    """The largest that any module has."""
    root: bool
    """Whether the scale is alpha / √r (``use_rslora``) and not alpha / r."""

    @classmethod
    def read(cls, raw: Mapping[str, Any]) -> _Ranks:
        r: Any = raw.get("r")
        pattern = raw.get("rank_pattern") or {}
        try:
            fine = all(isinstance(n, int) and n >= 1 for n in [r, *pattern.values()])
            for key in pattern:
                re.compile(key)
        except (AttributeError, re.error):
            fine = False
        if not fine:
            raise AdapterFormatError(
                f"{CONFIG_NAME}: r must be, and rank_pattern map module names to, whole numbers "
                ">= 1"
            )
        return cls(r, pattern, _largest_alpha(raw), bool(raw.get("use_rslora")))

    @property
    def largest(self) -> int:
        return max([self.r, *self.pattern.values()])

    def misfits(self, module: str, rank: int) -> list[str]:
        said = _of_pattern(self.pattern, module) or self.r
        return [] if said == rank else [f"{module}: rank {rank}, but {CONFIG_NAME} says {said}"]


def _of_pattern(pattern: Mapping[str, Any], module: str) -> Any:
    """Return what a pattern says of a module, as PEFT reads it: the first key that is the end of
    the name counts; None if it says nothing."""
    keys = (key for key in pattern if re.match(rf"(.*\.)?({key})$", module))
    return next((pattern[key] for key in keys), None)


def _largest_alpha(raw: Mapping[str, Any]) -> float:
    pattern = raw.get("alpha_pattern") or {}
    said = [
        raw.get("lora_alpha", _PEFT_ALPHA),
        *(pattern.values() if isinstance(pattern, Mapping) else [pattern]),
    ]
    if not all(isinstance(n, (int, float)) and abs(n) <= sys.float_info.max for n in said):
        raise AdapterFormatError(
            f"{CONFIG_NAME}: lora_alpha must be, and alpha_pattern map module names to, numbers"
        )
    return float(max(map(abs, said)))


def _oversized(
    module: str, sides: dict[str, tuple[int, int]], said: _Ranks, norms: Mapping[str, float]
) -> list[str]:
    """Return what is too large, see :mod:`secura_serve.adapter.limits`."""
    A, B = (norms[f"base_model.model.{module}.lora_{side}.weight"] for side in "AB")
    (r, wide), (tall, _) = sides["A"], sides["B"]
    scale = said.alpha / (r**0.5 if said.root else r)
    rms = scale * A * B / (tall * wide) ** 0.5
    if rms <= LARGEST_RMS:
        return []
    return [f"{module}: B·A may reach {rms:.1e} in root mean square, which would overflow"]


def _misfits(module: str, sides: dict[str, tuple[int, int]], base: Checkpoint) -> list[str]:
    if set(sides) != {"A", "B"}:
        return [f"{module}: lora_A and lora_B must both be there"]
    try:
        out, into = base.shape(module)
    except BaseModelError:
        return [f"{module}: the base has no such linear"]
    (r, wide), (tall, s) = sides["A"], sides["B"]
    if (tall, wide) != (out, into) or r != s:
        return [f"{module}: B·A is ({tall}, {s})·({r}, {wide}), but W is ({out}, {into})"]
    return []
