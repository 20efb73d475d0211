"""``SecuraConfig``: the configuration of a CUR adapter in PEFT."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import InitVar, dataclass, field
from math import inf
from pathlib import Path
from typing import Any

from peft import PeftConfig

from secura_serve.adapter import FORMAT_VERSION, AdapterConfig, CalibratedBasis, load
from secura_serve.adapter.format import WEIGHTS_NAME
from secura_serve.errors import AdapterFormatError, ConfigError
from secura_serve.method import INITS, Basis, MagNorm, selection_problem
from secura_serve.system.os_errors import reason
from secura_serve.train.tuner.peft_type import extend_peft_type

__all__ = ["SecuraConfig"]


def _help(text: str) -> dict[str, str]:
    return {"help": text}


@dataclass
class SecuraConfig(PeftConfig):
    """A CUR adapter ΔW = s·C·U·R (CURLoRA, arXiv 2408.14572; SECURA, arXiv 2502.18168).

    Only U (r, r) is trained, or its factors A (r, m) and B (m, r). C = W[:, cols] and
    R = W[rows, :] are W's own columns and rows and are never stored.

    When not to use it: for tasks that need large changes of the base. The update uses few rows and
    columns, and the least important ones, so it is small by design.

    Raises:
        ConfigError: listing every setting that is not allowed.
    """

    r: int = field(default=16, metadata=_help("rows and columns in the basis"))
    target_modules: list[str] | set[str] | str | None = field(
        default=None, metadata=_help("names, a regular expression or 'all-linear'")
    )
    exclude_modules: list[str] | set[str] | str | None = field(
        default=None, metadata=_help("names or a regular expression to leave alone")
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata=_help("layer numbers to adapt; all by default")
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata=_help("name of the layer list, for layers_to_transform")
    )
    alpha: float | str = field(
        default="auto", metadata=_help("step scale s; auto: 0.1·sqrt(out·in)/(‖C‖_F·‖R‖_F)")
    )
    selection: Mapping[str, Any] | str = field(
        default_factory=lambda: {"rule": "inverse_sampled", "seed": 0},
        metadata=_help(
            "how rows and columns are chosen: a rule, or with its seed, which belongs to the base"
        ),
    )
    basis: CalibratedBasis | None = field(
        default=None, metadata=_help("a calibrated basis, from load_basis; it sets selection")
    )
    core: str = field(default="u", metadata=_help("u: U is trained; ab: U = A·B (CABR)"))
    inner_rank: int | None = field(
        default=None,
        metadata=_help("m of core ab; r by default, below r it is the rank of the update"),
    )
    init: str = field(default="block", metadata=_help("start of A: block or svd"))
    magnorm: Mapping[str, Any] | str | None = field(
        default=None,
        metadata=_help('S-MagNorm mode, or with its setting: {"mode": "bounded", "tau": 0.02}'),
    )
    dropout: float = field(
        default=0.0,
        metadata=_help("chance that an entry of R·x is dropped in training; magnorm none only"),
    )
    base_fingerprint: Mapping[str, str] = field(
        default_factory=dict, metadata=_help("module -> digest; filled in, not set")
    )
    format_version: int = field(default=FORMAT_VERSION, metadata=_help("of the folder on disk"))
    stored_bases: Mapping[str, Basis] | None = field(
        default=None, metadata=_help("module -> indices in the folder; filled in, not set")
    )
    # Of the file beside it, not of the configuration; PEFT would warn of a setting that is unknown.
    weights_digest: InitVar[str | None] = None

    def __post_init__(self, weights_digest: str | None) -> None:
        super().__post_init__()
        self.peft_type = extend_peft_type("SECURA")
        if isinstance(self.target_modules, (list, tuple)):
            self.target_modules = set(self.target_modules)
        if isinstance(self.magnorm, str):
            self.magnorm = None if self.magnorm == "none" else {"mode": self.magnorm}
        if isinstance(self.selection, str):
            self.selection = {"rule": self.selection, "seed": 0}
        if self.basis is not None:
            self.selection = self.basis.selection
        problems = []
        if not isinstance(self.r, int) or self.r < 1:
            problems.append(f"r: got {self.r!r}, must be an integer >= 1")
        if self.core not in ("u", "ab"):
            problems.append(f"core: got {self.core!r}, allowed: u, ab")
        if self.init not in INITS:
            problems.append(f"init: got {self.init!r}, allowed: {', '.join(INITS)}")
        if self.core == "ab":
            self.inner_rank = self.r if self.inner_rank is None else self.inner_rank
            if not isinstance(self.inner_rank, int) or self.inner_rank < 1:
                problems.append(f"inner_rank: got {self.inner_rank!r}, must be an integer >= 1")
        number = isinstance(self.alpha, (int, float)) and 0 < self.alpha < inf
        if self.alpha != "auto" and not number:
            problems.append(f'alpha: got {self.alpha!r}, must be "auto" or a number > 0')
        if needs := selection_problem(self.selection):
            problems.append(f"selection: got {self.selection}, needs {needs}")
        if not isinstance(self.dropout, (int, float)) or not 0 <= self.dropout < 1:
            problems.append(f"dropout: got {self.dropout!r}, must be in [0, 1)")
        norm = MagNorm()
        try:
            norm = self.norm
        except ConfigError as error:
            problems.append(str(error))
        if self.dropout and not norm.additive:
            problems.append(
                f"dropout: got {self.dropout} with S-MagNorm {norm.mode!r}; allowed with none only"
            )
        if problems:
            raise ConfigError("SecuraConfig is not valid:", problems)
        if not norm.foldable:
            warnings.warn(
                f"S-MagNorm {norm.mode!r} is for reproduction only: it acts on activations, so the "
                "adapter can be trained and evaluated here, but never merged or served",
                stacklevel=3,
            )

    @property
    def rule_and_seed(self) -> tuple[str, int]:
        """The rule and the seed of ``selection``."""
        assert not isinstance(self.selection, str)
        return self.selection["rule"], self.selection["seed"]

    @property
    def norm(self) -> MagNorm:
        """The ``MagNorm`` of ``magnorm``."""
        # __post_init__ has replaced a plain name by a mapping.
        return MagNorm.from_json(self.magnorm)  # type: ignore[arg-type]

    def to_adapter_config(self) -> AdapterConfig:
        """Return the same settings as the content of ``adapter_config.json``."""
        targets = self.target_modules
        narrowed = self.exclude_modules or self.layers_to_transform is not None
        if isinstance(targets, str) or narrowed:
            # The format has plain names only, so the modules that a pattern matched are listed.
            targets = list(self.base_fingerprint) or [str(targets)]
        names = tuple(sorted(targets or ()))
        return AdapterConfig(
            base_model_name_or_path=self.base_model_name_or_path or "",
            r=self.r,
            target_modules=names,
            base_fingerprint=dict(self.base_fingerprint),
            alpha=self.alpha,
            selection=dict(self.selection),  # type: ignore[arg-type]
            core=self.core,
            inner_rank=self.inner_rank,
            magnorm=self.norm,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return what PEFT writes to ``adapter_config.json``: exactly this project's format."""
        return self.to_adapter_config().to_json()

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Save as PEFT does, without ``auto_mapping``: the format has a task type already."""
        kwargs.pop("auto_mapping_dict", None)
        super().save_pretrained(save_directory, **kwargs)

    @classmethod
    def from_json_file(cls, path_json_file: str | os.PathLike[str], **kwargs: Any) -> Any:
        """Read and check ``adapter_config.json``.

        Raises:
            AdapterFormatError: it is not a well-formed SECURA configuration.
        """
        try:
            with open(path_json_file, encoding="utf-8") as file:
                raw = json.load(file)
        except (OSError, ValueError, RecursionError) as error:
            raise AdapterFormatError(
                f"adapter_config.json cannot be read: {reason(error)}"
            ) from error
        written = AdapterConfig.from_json(raw)
        folder = Path(path_json_file).parent
        # transformers' load_adapter copies nothing but U, and no rule gives these indices.
        if "basis" in written.selection and (folder / WEIGHTS_NAME).is_file():
            stored = {module: cur.basis for module, cur in load(folder).modules.items()}
            return raw | {"stored_bases": stored}
        return raw
