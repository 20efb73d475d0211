"""Settings of the commands: frozen dataclasses whose field help feeds ``--help``.

Defaults live here and nowhere else. :func:`add_flags` turns a dataclass into argparse flags and
:func:`build` makes the dataclass from a mapping, refusing every key that it does not know.
"""

from __future__ import annotations

import argparse
import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field
from typing import Any, TypeVar

from secura_serve.errors import ConfigError

__all__ = ["TrainConfig", "add_flags", "build", "option"]

T = TypeVar("T")


def option(help: str, default: Any = MISSING, choices: tuple[str, ...] | None = None) -> Any:
    """A dataclass field with its ``--help`` line and, where closed, its allowed values."""
    return field(default=default, metadata={"help": help, "choices": choices})


def _kind(hint: Any) -> tuple[type, bool]:
    """The plain type of an annotation such as ``int | None``, and whether None is allowed."""
    if isinstance(hint, types.UnionType):
        inner = [t for t in typing.get_args(hint) if t is not type(None)]
        return inner[0], len(inner) < len(typing.get_args(hint))
    return typing.get_origin(hint) or hint, False


def _listed(text: str) -> list[str]:
    """``a,b`` as a list."""
    return [part.strip() for part in text.split(",") if part.strip()]


def add_flags(parser: argparse.ArgumentParser, cls: type) -> None:
    """Add one ``--flag`` per field of ``cls``; a flag that is not given leaves no attribute.

    A field of type ``tuple[str, ...]`` takes names joined by commas, and its flag may be repeated.
    """
    hints = typing.get_type_hints(cls)
    for item in dataclasses.fields(cls):
        kind, _ = _kind(hints[item.name])
        text = item.metadata["help"]
        required = item.default is MISSING
        if not required and item.default is not None and item.default != ():
            text += f" (default: {item.default})"
        extra: dict[str, Any] = {"choices": item.metadata["choices"], "type": kind}
        if kind is bool:
            extra = {"action": argparse.BooleanOptionalAction}
        elif kind is tuple:
            extra = {"action": "extend", "type": _listed}
        parser.add_argument(
            "--" + item.name.replace("_", "-"),
            help=text.replace("%", "%%"),
            default=argparse.SUPPRESS,
            **extra,
        )


def build(cls: type[T], values: Mapping[str, Any]) -> T:
    """``cls(**values)`` with every unknown key, missing key and wrong type told at once.

    Raises:
        ConfigError: with one problem per key.
    """
    hints = typing.get_type_hints(cls)
    fields = {item.name: item for item in dataclasses.fields(cls)}  # type: ignore[arg-type]
    problems = [
        f"{key}: unknown; allowed: {', '.join(sorted(fields))}"
        for key in values
        if key not in fields
    ]
    good: dict[str, Any] = {}
    for name, item in fields.items():
        if name not in values:
            if item.default is MISSING:
                problems.append(f"{name}: missing; give --{name.replace('_', '-')}")
            continue
        value, (kind, optional) = values[name], _kind(hints[name])
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if kind is tuple and isinstance(value, list):
            value = tuple(value)
        right = (value is None and optional) or (
            isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
        )
        allowed = item.metadata["choices"]
        if not right:
            problems.append(f"{name}: got {value!r}, expected {kind.__name__}")
        elif allowed and value is not None and value not in allowed:
            problems.append(f"{name}: got {value!r}, allowed: {', '.join(allowed)}")
        good[name] = value
    if problems:
        raise ConfigError(f"{cls.__name__} is not valid:", problems)
    return cls(**good)


@dataclass(frozen=True)
class TrainConfig:
    """One training run of ``secura-train``; stored in full in the adapter's ``train.json``."""

    base: str = option("base model: an alias, a hub id or a local folder")
    data: str = option("training data: JSONL of {messages} or {prompt, completion}")
    out: str = option("adapter folder to write; its last part is the adapter's name")
    eval_data: str | None = option("held-out JSONL for loss and token accuracy", None)
    eval_split: float = option("share of --data held out when there is no --eval-data", 0.0)
    targets: str = option("modules to adapt: all-linear, or names joined by commas", "all-linear")
    rank: int = option("rows and columns of each weight in the basis", 32)
    core: str = option("what is trained: u = U itself, ab = U as A·B (CABR)", "u", ("u", "ab"))
    inner_rank: int | None = option("inner rank m >= rank of core ab (default: rank)", None)
    init: str = option("start of A in core ab", "block", ("block", "svd"))
    magnorm: str = option(
        "S-MagNorm mode; none stays servable per request, the others must be folded",
        "none",
        ("none", "published", "bounded"),
    )
    tau: float = option("bounded: largest relative change of a weight", 0.02)
    alpha: str = option("step scale of U: auto, or a number", "auto")
    selection: str = option(
        "rule that picks rows and columns", "inverse_sampled", ("inverse_sampled", "lowest_norm")
    )
    selection_seed: int = option("seed of the basis; keep it to share one basis per base", 0)
    lr: float = option("peak learning rate; bounded wants about 1/tau more", 4e-3)
    schedule: str = option(
        "learning-rate schedule after warm-up", "cosine", ("cosine", "linear", "constant")
    )
    warmup: float = option("share of the steps spent warming up", 0.05)
    weight_decay: float = option("AdamW weight decay on the core", 0.0)
    epochs: float = option("passes over the data", 1.0)
    max_steps: int = option("stop after this many steps; -1 follows --epochs", -1)
    batch_size: int = option("sequences per step and device", 8)
    accumulate: int = option("batches added up per optimiser step", 1)
    max_length: int = option("longest sequence in tokens; a longer one is an error", 512)
    dtype: str = option(
        "dtype of the frozen base; the core is always float32",
        "bfloat16",
        ("bfloat16", "float16", "float32"),
    )
    device: str = option("where to train", "auto", ("auto", "cpu"))
    seed: int = option("seed of data order and initialisation", 0)
    overwrite: bool = option("replace an existing adapter folder", False)

    def __post_init__(self) -> None:
        problems = [
            f"{name}: got {getattr(self, name)!r}, must be {bound}"
            for name, fine, bound in (
                ("rank", self.rank >= 1, ">= 1"),
                ("epochs", self.epochs > 0, "> 0"),
                ("lr", self.lr > 0, "> 0"),
                ("batch_size", self.batch_size >= 1, ">= 1"),
                ("accumulate", self.accumulate >= 1, ">= 1"),
                ("max_length", self.max_length >= 8, ">= 8"),
                ("eval_split", 0 <= self.eval_split < 1, "in [0, 1)"),
                ("warmup", 0 <= self.warmup < 1, "in [0, 1)"),
                ("inner_rank", (self.inner_rank or self.rank) >= self.rank, ">= rank"),
            )
            if not fine
        ]
        try:
            self.alpha_value()
        except ValueError:
            problems.append(f'alpha: got {self.alpha!r}, must be "auto" or a number')
        if problems:
            raise ConfigError("the training settings are not valid:", problems)

    def alpha_value(self) -> float | str:
        """``"auto"`` or the number."""
        return self.alpha if self.alpha == "auto" else float(self.alpha)

    def target_modules(self) -> str | list[str]:
        """As PEFT takes it: the shorthand or a list of names."""
        if self.targets == "all-linear":
            return self.targets
        return [name.strip() for name in self.targets.split(",") if name.strip()]
