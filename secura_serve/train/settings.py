"""``TrainConfig``: every setting of ``secura-train``, its default, its help and its bounds."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from secura_serve.config import (
    NOT_NEGATIVE,
    POSITIVE,
    SEED,
    SHARE,
    Bound,
    at_least,
    not_allowed,
    option,
)
from secura_serve.errors import ConfigError
from secura_serve.train.checks import (
    BEFORE_COORDINATES,
    contradictions,
    layer_ranges,
    malformed,
    not_supported,
    settings_not_supported_by,
)
from secura_serve.train.dtype import fastest_dtype
from secura_serve.train.methods.registry import METHODS

__all__ = [
    "NO_PUSHES",
    "REMOVED",
    "REPRODUCTION_ONLY",
    "SELF",
    "TrainConfig",
    "not_taken_over",
]

REPRODUCTION_ONLY = ("activation", "reference")
"""S-MagNorm modes that act on activations: trained and evaluated here, never merged or served."""
SELF = "self"
"""The ``retain_data`` that the base writes itself."""
REMOVED = {"accumulation": "it never changed anything: m1 and m2 are the same sum here"}
"""Settings of earlier versions, which old recipes still hold, and why they are ignored."""
NO_PUSHES = {"push_to": None, "push_name": None, "push_every": 10}
"""What a recipe says of pushes: whom a run was pushed to does not change what it makes."""
# What a method sets by itself, and what depends on it: not taken over from another method's recipe.
_SET_BY_METHOD = (
    *("core", "inner_rank", "init", "magnorm", "tau", "magnorm_parameters", "fusion_step"),
    *("coordinates", "damping", "learning_rate"),
)


def not_taken_over(method: str) -> set[str]:
    """Return the settings that a run of ``method`` cannot take from another method's recipe."""
    return {*_SET_BY_METHOD, *settings_not_supported_by(method)}


@dataclass(frozen=True)
class TrainConfig:
    """The settings of one training run; all of them are stored in the ``train.json`` it writes.

    Raises:
        ConfigError: listing every setting that is out of bounds or not supported by the method.
    """

    base: str = option("base model: an alias, a hub id or a local folder")
    data: str = option("training data: a JSONL, CSV or parquet file, or a hub id[:config][:split]")
    out: str = option("folder to write; its last part is the adapter's name")
    method: str = option(
        "what is trained: " + ", ".join(f"{name} = {m.summary}" for name, m in METHODS.items()),
        "curlora",
        METHODS,
    )
    data_columns: str | None = option(
        "fields under other names: prompt=question,completion=answer", None
    )
    labels: str | None = option("the only completions allowed, joined by commas", None)
    eval_data: str | None = option("held-out data for loss and token accuracy", None)
    eval_split: float = option(
        "share of --data held out when there is no --eval-data", 0.0, bound=SHARE
    )
    eval_steps: int = option(
        "evaluate every so many steps; 0: only at the end", 0, bound=at_least(0)
    )
    patience: int = option(
        "stop after so many evaluations without a new lowest loss, and keep the best; 0: off",
        0,
        bound=at_least(0),
    )
    targets: str = option(
        "modules to adapt: all-linear, names joined by commas, or a regular expression. full: all "
        "weights by default, or those of the linear layers that are named (.*_proj: all of them in "
        "most models)",
        "all-linear",
    )
    exclude: str | None = option("modules to leave alone: names or a regular expression", None)
    layers: str | None = option(
        "layers to adapt, such as 0,2,8-11 (default: all); needs --targets by name", None
    )
    layers_pattern: str | None = option("name of the layer list, for --layers", None)
    rank: int = option(
        "curlora, secura: rows and columns of the basis; lora, dora: the rank",
        32,
        bound=at_least(1),
    )
    core: str | None = option(
        "u = U itself, ab = U as A·B (CABR) (default: by method)", None, ("u", "ab")
    )
    inner_rank: int | None = option(
        "inner rank m of core ab; below rank it is the rank of the update (default: rank)",
        None,
        bound=at_least(1),
    )
    init: str = option("start of A in core ab", "block", ("block", "svd"))
    magnorm: str | None = option(
        "S-MagNorm mode (default: by method). none is served per request at no cost, published "
        "and bounded in a place of the engine or folded; activation and reference are for "
        "reproduction only and cannot be merged or served",
        None,
        metavar="MODE",
    )
    tau: float = option("bounded: largest relative change of a weight", 0.02, bound=POSITIVE)
    magnorm_parameters: str | None = option(
        "other parameters of the S-MagNorm mode, joined by commas (published: scale=6)",
        None,
        metavar="NAME=NUMBER",
    )
    alpha: str = option("step scale of U: auto, or a number", "auto")
    selection: str = option(
        "rule that picks rows and columns: inverse_sampled, lowest_norm, or calibrated, which "
        "keeps more of the base (its basis file is made once and kept)",
        "inverse_sampled",
        metavar="RULE",
    )
    basis: str | None = option(
        "curlora, secura: file with a calibrated basis of the base; implies --selection calibrated",
        None,
        metavar="FILE",
    )
    selection_seed: int = option("seed of the basis; keep it to share one basis per base", 0)
    coordinates: str | None = option(
        "what U is trained in: natural = directions that cost the base equally much on text that "
        "it wrote itself, which keeps far more of it; plain = its own entries (default: natural "
        "with core u, magnorm none and selection inverse_sampled, else plain)",
        None,
        ("plain", "natural"),
    )
    damping: float = option(
        "coordinates natural: what counts as no quieter, as a share of the mean energy",
        0.01,
        bound=POSITIVE,
    )
    fusion_step: int = option(
        "core ab: every so many steps A·B is added to a running sum and B is set to 0; 0: never",
        0,
        bound=at_least(0),
    )
    dropout: float = option(
        "dropout on the low-rank intermediate; curlora, secura: with magnorm none only",
        0.0,
        bound=SHARE,
    )
    lora_alpha: float | None = option(
        "lora, dora: scale numerator (default: twice the rank)", None, bound=POSITIVE
    )
    learning_rate: float | None = option(
        "peak learning rate; magnorm bounded needs one about 1/tau times higher (default: "
        + ", ".join(f"{name} {m.defaults['learning_rate']:g}" for name, m in METHODS.items())
        + ")",
        None,
        aliases=("lr",),
        bound=POSITIVE,
    )
    lr_scheduler_type: str = option(
        "learning-rate schedule after warm-up",
        "cosine",
        ("cosine", "linear", "constant"),
        aliases=("schedule",),
    )
    warmup_steps: float = option(
        "warm-up: a share of the steps below 1; from 1 on, the number of steps",
        0.05,
        aliases=("warmup", "warmup-ratio"),
        bound=Bound(
            lambda n: 0 <= n < 1 or (n >= 1 and float(n).is_integer()),
            "a share in [0, 1) or a whole number of steps",
        ),
    )
    weight_decay: float = option(
        "AdamW weight decay of the trainable parameters", 0.0, bound=NOT_NEGATIVE
    )
    num_train_epochs: float = option(
        "passes over the data", 1.0, aliases=("epochs",), bound=POSITIVE
    )
    max_steps: int = option(
        "stop after this many steps; -1: at the end of the last epoch",
        -1,
        bound=Bound(lambda n: n == -1 or n >= 1, "-1 or >= 1"),
    )
    per_device_train_batch_size: int = option(
        "sequences per batch and device", 8, aliases=("batch-size",), bound=at_least(1)
    )
    gradient_accumulation_steps: int = option(
        "batches added up per optimiser step", 1, aliases=("accumulate",), bound=at_least(1)
    )
    max_length: int = option("longest sequence in tokens", 512, bound=at_least(8))
    over_long: str = option(
        "a longer example is an error, cut off at its end, or left out",
        "error",
        ("error", "truncate", "skip"),
    )
    packing: bool = option(
        "put the examples of a batch end to end in one row instead of padding them", False
    )
    dtype: str = option(
        "dtype of the frozen base; adapters are always float32. full: weights are float32, and "
        "bfloat16 computes under autocast and writes bfloat16. auto: bfloat16, or float32 where a "
        "CPU is faster with it (not for full)",
        "auto",
        ("auto", "bfloat16", "float16", "float32"),
    )
    retain: float = option(
        "weight of the retention objective, the KL from base to adapted model per token of text "
        "that the base wrote by itself; 0: off",
        0.0,
        bound=NOT_NEGATIVE,
    )
    retain_data: str = option(
        "text of --retain: self, or a file like --data, whose answers are scored", SELF
    )
    retain_sequences: int = option(
        "rows of that text; of a file at most so many", 256, bound=at_least(1)
    )
    retain_length: int = option("tokens that the base writes in each row", 96, bound=at_least(1))
    retain_batch_size: int = option("rows of that text per batch and device", 4, bound=at_least(1))
    device: str = option("where to train", "auto", ("auto", "cpu"))
    seed: int = option("seed of data order and initialisation", 0, bound=SEED)
    save_steps: int = option(
        "checkpoint every so many steps; 0: only on Ctrl-C. With --patience: at every evaluation; "
        "with --tasks: after each task",
        100,
        bound=at_least(0),
    )
    run_dir: str | None = option(
        "folder of the checkpoints (default: .NAME.run beside --out)", None
    )
    resume: str | None = option(
        "continue a stopped run: auto = its newest complete checkpoint, or the folder of one", None
    )
    overwrite: bool = option("replace an existing folder and delete its checkpoints", False)
    push_to: str | None = option(
        "curlora, secura: URL of a running secura-serve that gets the adapter while it is trained; "
        "its admin key is $SECURA_ADMIN_API_KEY",
        None,
        metavar="URL",
    )
    push_name: str | None = option(
        "name that the adapter gets there (default: the last part of --out)", None
    )
    push_every: int = option(
        "push every so many steps, and at the end; 0: only at the end", 10, bound=at_least(0)
    )

    def __post_init__(self) -> None:
        method = METHODS[self.method]
        problems = not_allowed(self) + self._not_supported() + malformed(self)
        for name, value in method.defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        if self.basis and self.selection == "inverse_sampled":
            object.__setattr__(self, "selection", "calibrated")
        if self.coordinates is None:
            # What has been measured to keep more of the base at an equal score, and no more.
            measured = ("u", "none", "inverse_sampled")
            natural = (self.core, self.magnorm, self.selection) == measured and method.is_cur
            # Also where it means nothing: earlier versions wrote it there, into runs that go on.
            object.__setattr__(self, "coordinates", "natural" if natural else "plain")
        problems += self._contradictions()
        if problems:
            raise ConfigError("the settings are not valid:", problems)
        if self.dtype == "auto":
            dtype = "bfloat16" if method.trains_all_weights else fastest_dtype(self.device)
            object.__setattr__(self, "dtype", dtype)

    def _not_supported(self) -> list[str]:
        return not_supported(self)

    def _contradictions(self) -> list[str]:
        return contradictions(self)

    def sources(self) -> dict[str, str]:
        """Return where the data come from: setting -> file or hub id."""
        named = {"eval_data": self.eval_data, "basis": self.basis}
        if self.retain_data != SELF:
            named["retain_data"] = self.retain_data
        return {"data": self.data} | {name: file for name, file in named.items() if file}

    @classmethod
    def upgrade(cls, written: Mapping[str, Any]) -> dict[str, Any]:
        """Return settings that an earlier version wrote, under the names of this one."""
        names = {old: item.name for item in fields(cls) for old in item.metadata["aliases"]}
        current = {names.get(key, key): v for key, v in written.items() if key not in REMOVED}
        # What a run did before there was a setting is what its default does.
        later = {
            item.name: item.default
            for item in fields(cls)
            if item.name in ("basis", "damping") or item.name.startswith("retain")
        }
        return later | BEFORE_COORDINATES | current

    def portable(self) -> dict[str, Any]:
        """Return the settings as a recipe keeps them, without what is of this machine alone."""
        files = {k: Path(v).name if Path(v).exists() else v for k, v in self.sources().items()}
        local = {"out": Path(self.out).name, "run_dir": None, "resume": None}
        return asdict(self) | files | local | NO_PUSHES

    def alpha_value(self) -> float | str:
        """Return ``alpha`` parsed: ``"auto"`` or the number."""
        return self.alpha if self.alpha == "auto" else float(self.alpha)

    def magnorm_settings(self) -> dict[str, Any] | None:
        """Return the S-MagNorm mode with its parameters as an adapter keeps them, or None."""
        if self.magnorm in (None, "none"):
            return None
        from secura_serve.method import get_mode

        given = dict(pair.split("=") for pair in (self.magnorm_parameters or "").split(",") if pair)
        tau = {"tau": self.tau} if "tau" in get_mode(str(self.magnorm)).parameters else {}
        return {"mode": self.magnorm} | tau | {name: float(text) for name, text in given.items()}

    def target_modules(self) -> str | list[str]:
        """Return ``targets`` for PEFT: ``all-linear``, a regular expression or a list of names."""
        return _names(self.targets)

    def exclude_modules(self) -> str | list[str] | None:
        """Return ``exclude`` for PEFT: None, a regular expression or a list of names."""
        return _names(self.exclude) if self.exclude else None

    def layer_numbers(self) -> list[int] | None:
        """Return the numbers of ``layers``, sorted; None for all."""
        if not self.layers:
            return None
        return sorted({n for a, b in layer_ranges(self.layers) for n in range(a, b + 1)})


def _names(text: str) -> str | list[str]:
    if text == "all-linear" or not re.fullmatch(r"[\w.]+(\s*,\s*[\w.]+)*,?", text):
        return text
    return [name.strip() for name in text.split(",") if name.strip()]
