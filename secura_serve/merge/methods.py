"""How several adapters become one update: their weighted sum, TIES or DARE.

The sum is exact on any bases. The others are PEFT's functions, which compare and drop single
entries of the adapters' tensors; here these are the U of one linear. So all adapters must have the
same rows and columns there, and the result depends on that basis: it is not what the same method
makes of the ΔW.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from secura_serve.errors import ConfigError, MergeError
from secura_serve.merge.config import METHODS
from secura_serve.merge.fold import Part

__all__ = ["LINEAR", "MergeMethod", "combined_parts"]


@dataclass(frozen=True)
class MergeMethod:
    """A method with its parameters."""

    name: str = "linear"
    density: float = 1.0
    """Share of the entries of each U that is kept."""
    seed: int = 0
    """Of what ``dare_*`` drops."""

    def __post_init__(self) -> None:
        if self.name not in METHODS:
            raise ConfigError(f"merge method {self.name!r}: allowed are {', '.join(METHODS)}")
        if self.name != "linear" and not 0 < self.density < 1:
            raise ConfigError(f"density: got {self.density}, must be between 0 and 1")

    def to_json(self) -> dict[str, Any] | None:
        """Return what a manifest says of it; None for the plain sum."""
        return None if self == LINEAR else asdict(self)


LINEAR = MergeMethod()


def combined_parts(method: MergeMethod, module: str, parts: Sequence[Part]) -> tuple[Part, ...]:
    """Return the parts of one module that fold to what the method makes of them.

    Raises:
        MergeError: the method compares entries, and the adapters' rows or columns differ.
        ConfigError: PEFT is not installed.
    """
    if method.name == "linear":
        return tuple(parts)
    first = parts[0]
    for part in parts[1:]:
        same = torch.equal(part.basis.rows, first.basis.rows) and torch.equal(
            part.basis.cols, first.basis.cols
        )
        if not same:
            raise MergeError(
                f"{method.name} compares entries of U, and {first.adapter} and {part.adapter} "
                f"have other rows or columns in {module}: train them with one rank and one "
                "--selection, or use --merge-method linear"
            )
    weights = torch.tensor([part.weight for part in parts], dtype=torch.float32)
    digest = hashlib.sha256(f"{method.seed}|{module}".encode()).digest()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        U = _function(method.name)(
            [part.U.to(torch.float32) for part in parts], weights, method.density
        )
    names = "+".join(part.adapter for part in parts)
    return (Part(names, 1.0, U, first.basis, first.fingerprint),)


def _function(name: str) -> Callable[[list[Tensor], Tensor, float], Tensor]:
    try:
        from peft.utils import merge_utils
    except ImportError as error:
        raise ConfigError(
            f"--merge-method {name} needs PEFT: pip install 'secura-serve[train]'"
        ) from error
    function: Callable[[list[Tensor], Tensor, float], Tensor] = getattr(merge_utils, name)
    return function
