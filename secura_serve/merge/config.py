"""Settings of ``secura-merge``."""

from __future__ import annotations

from dataclasses import dataclass

from secura_serve.config import Bound, at_least, not_allowed, option
from secura_serve.errors import ConfigError

__all__ = ["METHODS", "MergeConfig"]

METHODS = ("linear", "ties", "dare_linear", "dare_ties")
"""``linear``: Σ wᵢUᵢ. ``ties`` (arXiv 2306.01708): of each U the largest entries; of these, those
whose sign has the larger sum; the mean of them, weighted. ``dare_linear`` (2311.03099): entries are
dropped at random, the others divided by the density, and the rest is summed. ``dare_ties``: dropped
in this way, then as ``ties``."""


@dataclass(frozen=True)
class MergeConfig:
    """One run of ``secura-merge``.

    Raises:
        ConfigError: with every setting that is missing, or that does not go with another.
    """

    out: str = option("folder to write; it appears whole or not at all")
    base: str | None = option("base model: an alias, a hub id or a local folder", None)
    adapter: tuple[str, ...] = option(
        "adapter folder, may be repeated: one weighted sum, S-MagNorm on the total",
        (),
        metavar="DIR[*WEIGHT]",
        split=False,
    )
    merge_method: str = option(
        "how several adapters become one update: linear is their weighted sum; ties, dare_linear "
        "and dare_ties are PEFT's, on the U of adapters that have the same rows and columns",
        "linear",
        METHODS,
    )
    density: float | None = option(
        "with ties and dare_*: share of each U that is kept",
        None,
        bound=Bound(lambda x: 0 < x < 1, "between 0 and 1"),
    )
    merge_seed: int = option("of what dare_* drops at random", 0)
    dtype: str = option(
        "dtype of the output; auto keeps the base's (--to-lora: float32)",
        "auto",
        ("auto", "bfloat16", "float16", "float32"),
    )
    dry_run: bool = option("check everything, print the plan, write nothing", False)
    check: bool = option("compare --out with what would be written", False)
    to_base: str | None = option(
        "verify that BASE is the base of the merge in --out, and put its tensors back there; "
        "--out is then the base again, without the merge's card and manifest",
        None,
        metavar="BASE",
    )
    to_lora: bool = option("write a plain LoRA folder instead: exact for S-MagNorm none", False)
    approximate: bool = option("with --to-lora: the best LoRA of --rank, its error measured", False)
    rank: int | None = option("rank of --approximate", None, bound=at_least(1))

    def __post_init__(self) -> None:
        tasks = {
            "--dry-run": self.dry_run,
            "--check": self.check,
            "--to-base": self.to_base is not None,
            "--to-lora": self.to_lora,
        }
        problems = not_allowed(self)
        if len(asked := [flag for flag, given in tasks.items() if given]) > 1:
            problems.append(f"{', '.join(asked)}: only one of them at a time")
        if self.to_base:
            if self.base or self.adapter or self.dtype != "auto":
                problems.append("--to-base takes --out only: the merge's manifest knows the rest")
        elif not self.base:
            problems.append("--base is missing: an alias, a hub id or a folder")
        if self.approximate != (self.rank is not None):
            problems.append("--approximate and --rank k belong together")
        if self.approximate and not self.to_lora:
            problems.append("--approximate needs --to-lora")
        if (self.merge_method == "linear") != (self.density is None):
            problems.append("--density belongs to --merge-method ties, dare_linear and dare_ties")
        if self.merge_seed and not self.merge_method.startswith("dare_"):
            problems.append("--merge-seed belongs to --merge-method dare_linear and dare_ties")
        if problems:
            raise ConfigError("the settings are not valid:", problems)
