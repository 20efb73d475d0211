"""Settings of ``secura-basis``."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from secura_serve.config import SEED, at_least, not_allowed, option
from secura_serve.errors import ConfigError
from secura_serve.system.atomic import place_problem

__all__ = ["BasisConfig"]

_NOT_OF_THE_RANKING = {"base", "out", "device", "overwrite"}


@dataclass(frozen=True)
class BasisConfig:
    """One run of ``secura-basis``.

    Raises:
        ConfigError: with every setting that is out of bounds.
    """

    base: str = option("base model: an alias, a hub id or a local folder")
    out: str = option("file to write, such as basis.safetensors; it appears whole or not at all")
    sequences: int = option("texts that the base writes", 64, bound=at_least(1))
    length: int = option("tokens that it writes in each", 96, bound=at_least(2))
    seed: int = option("seed of the texts, and of the rule that draws columns", 0, bound=SEED)
    rows: str = option(
        "how rows are ranked, smallest first: energy = E[(Wx)_i²], relative = the same over ‖W_i‖²",
        "energy",
        ("energy", "relative"),
    )
    columns: str = option(
        "how columns are ranked: inverse_sampled = drawn by their norms, as for other adapters; "
        "gradient = E[(Wᵀg)_j²], g = dL/dy of that linear, smallest first (needs a backward pass)",
        "inverse_sampled",
        ("inverse_sampled", "gradient"),
    )
    dtype: str = option("dtype of the base", "bfloat16", ("bfloat16", "float16", "float32"))
    device: str = option("where to compute", "auto", ("auto", "cpu"))
    overwrite: bool = option("replace an existing file", False)

    def __post_init__(self) -> None:
        if problems := not_allowed(self):
            raise ConfigError("the settings are not valid:", problems)

    def check_out(self) -> None:
        """Refuse an output file before the work for it begins.

        Raises:
            ConfigError: it exists and ``overwrite`` is off, is a folder, or cannot be written.
        """
        out = Path(self.out).absolute()
        if os.path.isdir(out):
            raise ConfigError(
                f"{out} is a folder; --out names a file, such as {out}/basis.safetensors"
            )
        if os.path.lexists(out) and not self.overwrite:
            raise ConfigError(f"{out} exists; choose another --out or give --overwrite")
        if problem := place_problem(out):
            raise ConfigError(f"{problem}; choose another --out")

    def of_the_ranking(self) -> dict[str, Any]:
        """Return the settings that the ranking depends on, besides the base."""
        return {k: v for k, v in asdict(self).items() if k not in _NOT_OF_THE_RANKING}

    def command(self, base: str) -> str:
        """Return the command line that makes the same ranking."""
        changed = [
            f" --{item.name} {getattr(self, item.name)}"
            for item in fields(self)
            if item.name not in _NOT_OF_THE_RANKING and getattr(self, item.name) != item.default
        ]
        return f"secura-basis --base {base} --out {Path(self.out).name}" + "".join(changed)
