"""The basis file: one ranking of all rows and columns, which all calibrated adapters of a base use.

One safetensors file. For each linear layer ``<module>.rows`` (out,) and ``<module>.cols`` (in,)
hold every index once, uint16 or int32, and ``<module>.usable`` (2,) int32 how many of them carry a
signal. The metadata's ``secura_basis`` is a JSON object: format version, digest, base, fingerprints
of the base's weights, seed, and how the ranking was made.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from secura_serve.adapter.fingerprint import fingerprint_of
from secura_serve.errors import BaseMismatchError, BasisFormatError, ConfigError
from secura_serve.method import CALIBRATED, Basis, Ranking, gather
from secura_serve.system.atomic import write_whole
from secura_serve.system.os_errors import is_wrong_path, reason

__all__ = ["CalibratedBasis", "load_basis", "weight_fingerprint"]

_KEY, _VERSION = "secura_basis", 1
_COMPARED = 16


def weight_fingerprint(W: Tensor, ranking: Ranking) -> str:
    """Return 128 bits of SHA-256 over W's first 16 rows and columns of the ranking, in bfloat16.

    Rounded, so that a base that was loaded in bfloat16 and its float32 checkpoint are the same.

    Args:
        W: ``(out, in)``, pristine.
    """
    n = min(_COMPARED, *W.shape)
    basis = Basis(*(torch.from_numpy(part[:n].astype(np.int64)) for part in ranking[:2]))
    C, R = (part.to(torch.bfloat16) for part in gather(W.detach(), basis))
    return fingerprint_of(C, R, basis)


@dataclass(frozen=True, eq=False)
class CalibratedBasis:
    """The ranking of every linear layer of one base, and how it was made."""

    rankings: Mapping[str, Ranking]
    """Module, named as in an adapter -> its ranking."""
    fingerprints: Mapping[str, str]
    """Module -> :func:`weight_fingerprint` of its W."""
    facts: Mapping[str, Any]
    """``base``, ``seed``, and whatever else tells how the file was made."""

    @cached_property
    def digest(self) -> str:
        """The basis's name: 32 hex digits of BLAKE3 over all rankings, not over the file."""
        from blake3 import blake3

        digest = blake3()
        for module, ranking in sorted(self.rankings.items()):
            rows, cols, *usable = ranking
            digest.update(f"{module}|{len(rows)}x{len(cols)}|{usable}\n".encode())
            for part in (rows, cols):
                digest.update(part.astype("<i4").tobytes())
        name: str = digest.hexdigest()[:32]
        return name

    @property
    def selection(self) -> dict[str, Any]:
        """What an adapter on this basis keeps as its ``selection``."""
        return {"rule": CALIBRATED, "seed": self.facts["seed"], "basis": self.digest}

    def ranking(self, module: str, W: Tensor) -> Ranking:
        """Return the ranking of one layer, after comparing its base with W ``(out, in)``.

        Raises:
            ConfigError: the basis does not rank this layer.
            BaseMismatchError: it was made from another base.
        """
        if (ranking := self.rankings.get(module)) is None:
            raise ConfigError(
                f"{module}: the basis does not rank this layer; it ranks {len(self.rankings)}, "
                f"such as {', '.join(list(self.rankings)[:3])}. Leave the layer out of the targets"
            )
        shape = (len(ranking.rows), len(ranking.cols))
        same = tuple(W.shape) == shape
        if not same or weight_fingerprint(W, ranking) != self.fingerprints.get(module):
            what = "other weights" if same else f"shape {tuple(W.shape)} instead of {shape}"
            raise BaseMismatchError(
                f"{module}: the basis was made from another base ({self.facts['base']}): this one "
                f"has {what}. Give the basis file of this base, or make it: secura-basis --base "
                "BASE --out FILE"
            )
        return ranking

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the basis file, all of it or nothing; an old one is replaced.

        Raises:
            OSError: it cannot be written.
        """
        from safetensors.numpy import save as to_bytes

        target = Path(path).absolute()
        tensors = {}
        for module, (rows, cols, *usable) in self.rankings.items():
            for name, part in (("rows", rows), ("cols", cols)):
                small = np.uint16 if len(part) <= 2**16 else np.int32
                tensors[f"{module}.{name}"] = part.astype(small)
            tensors[f"{module}.usable"] = np.array(usable, dtype=np.int32)
        facts = {
            "format_version": _VERSION,
            "digest": self.digest,
            **self.facts,
            "fingerprints": dict(self.fingerprints),
        }
        target.parent.mkdir(parents=True, exist_ok=True)
        write_whole(target, to_bytes(tensors, {_KEY: json.dumps(facts)}))
        # It is meant to be shared; a draft is private.
        target.chmod(0o644)
        return target


def load_basis(path: str | os.PathLike[str]) -> CalibratedBasis:
    """Read and check a basis file.

    Raises:
        ConfigError: there is no such file.
        BasisFormatError: it is truncated, damaged, changed, or of an unknown format.
    """
    from safetensors import SafetensorError, safe_open

    file = Path(path)
    if not file.is_file():
        raise ConfigError(f"no basis file {file}; make one with secura-basis --base B --out {file}")
    try:
        with safe_open(file, framework="np") as handle:
            if _KEY not in (metadata := handle.metadata() or {}):
                raise BasisFormatError(
                    f"{file} holds no basis; give a file that secura-basis wrote", wrong_use=True
                )
            facts = json.loads(metadata[_KEY])
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
        if facts["format_version"] != _VERSION:
            raise BasisFormatError(
                f"{file}: format_version is {facts['format_version']!r}; this program reads "
                f"{_VERSION}. Make the basis again with secura-basis, or upgrade secura-serve"
            )
        fingerprints = dict(facts.pop("fingerprints"))
        rankings = {module: _ranking(tensors, module) for module in fingerprints}
        claimed = facts.pop("digest")
        del facts["format_version"]
        basis = CalibratedBasis(rankings, fingerprints, facts)
        whole = basis.digest == claimed and len(tensors) == 3 * len(rankings)
        _ = facts["base"], basis.selection
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, BasisFormatError):
            raise
        raise BasisFormatError(
            f"{file} is not a whole basis file ({reason(error)}); fetch it again, or make it with "
            "secura-basis",
            wrong_use=is_wrong_path(error),
        ) from error
    if not whole or not isinstance(facts["seed"], int):
        raise BasisFormatError(
            f"{file} was changed: its content is not that of digest {claimed}; fetch it "
            "again, or make it with secura-basis"
        )
    return basis


def _ranking(tensors: Mapping[str, np.ndarray], module: str) -> Ranking:
    """Return a layer's ranking; raises KeyError or ValueError where it is none."""
    rows, cols = (tensors[f"{module}.{axis}"].astype(np.int32) for axis in ("rows", "cols"))
    usable_rows, usable_cols = (int(n) for n in tensors[f"{module}.usable"])
    for order, usable in ((rows, usable_rows), (cols, usable_cols)):
        every = order.ndim == 1 and np.array_equal(np.sort(order), np.arange(len(order)))
        if not every or not 0 <= usable <= len(order):
            raise ValueError(f"{module} does not rank each index once")
    return Ranking(rows, cols, usable_rows, usable_cols)
