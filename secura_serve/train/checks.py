"""What is wrong with the settings of a run: one list of problems for each way to be wrong."""

from __future__ import annotations

import os
import re
from dataclasses import fields
from math import inf
from typing import TYPE_CHECKING

from secura_serve.addresses import url_problem
from secura_serve.errors import ConfigError
from secura_serve.train.methods.registry import METHODS

if TYPE_CHECKING:
    from secura_serve.train.settings import TrainConfig

__all__ = [
    "BEFORE_COORDINATES",
    "contradictions",
    "layer_ranges",
    "not_supported",
    "malformed",
    "settings_not_supported_by",
]

BEFORE_COORDINATES = {"coordinates": "plain"}
"""What a recipe means that was written before there were others."""


def settings_not_supported_by(method: str) -> set[str]:
    """Return the settings that some methods support and this one does not."""
    return set().union(*(m.settings for m in METHODS.values())) - METHODS[method].settings


def not_supported(config: TrainConfig) -> list[str]:
    """Report settings that were given and that the method does not support."""
    unsupported = settings_not_supported_by(config.method)
    return [
        f"{item.name}: not supported by method {config.method}; leave it out"
        for item in fields(config)
        if item.name in unsupported
        # Earlier versions wrote what means nothing for a method into its recipes as well.
        and getattr(config, item.name) not in (item.default, BEFORE_COORDINATES.get(item.name))
    ]


def malformed(config: TrainConfig) -> list[str]:
    """Report settings whose text says nothing that is known."""
    problems = []
    try:
        fine = config.alpha == "auto" or 0 < float(config.alpha) < inf
    except ValueError:
        fine = False
    if not fine:
        problems.append(f'alpha: got {config.alpha!r}, must be "auto" or a number > 0')
    if config.push_to and (problem := url_problem(config.push_to)):
        problems.append(f"push_to: {problem}")
    for name in ("targets", "exclude"):
        try:
            re.compile(getattr(config, name) or "")
        except re.error as error:
            problems.append(f"{name}: not a regular expression: {error}")
    problems += _unregistered(config)
    if config.layers and not re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", config.layers):
        problems.append(f"layers: got {config.layers!r}, must be like 0,2,8-11")
    elif config.layers and any(first > last for first, last in layer_ranges(config.layers)):
        problems.append(f"layers: got {config.layers!r}, a range must go upwards, like 1-3")
    columns = config.data_columns
    if columns and not re.fullmatch(r"(prompt|completion|messages)=[^,=]+(,\w+=[^,=]+)*", columns):
        problems.append(
            f"data_columns: got {columns!r}, must be like prompt=question,completion=answer"
        )
    return problems


def _unregistered(config: TrainConfig) -> list[str]:
    """Report an S-MagNorm mode, a parameter of it or a selection rule that nobody registered."""
    # They are registered beside their mathematics, which imports torch.
    from secura_serve.method import get_mode, get_rule

    problems = []
    for name, look_up, value in (
        ("magnorm", get_mode, config.magnorm),
        ("selection", get_rule, config.selection),
    ):
        try:
            if value is not None:
                look_up(value)
        except ConfigError as error:
            problems.append(f"{name}: {error}")
    pairs = config.magnorm_parameters
    if pairs and not re.fullmatch(r"\w+=\d[\d.e+-]*(,\w+=\d[\d.e+-]*)*", pairs):
        problems.append(f"magnorm_parameters: got {pairs!r}, must be like scale=6")
    return problems


def _has_parameter(config: TrainConfig, name: str) -> bool:
    from secura_serve.method import get_mode, mode_names

    # An unknown mode is reported as such.
    return config.magnorm not in mode_names() or name in get_mode(config.magnorm).parameters


def contradictions(config: TrainConfig) -> list[str]:
    """Report settings that do not go together; ``core`` and ``magnorm`` are no longer None."""
    held_out = bool(config.eval_data or config.eval_split)
    changed = {i.name for i in fields(config) if getattr(config, i.name) != i.default}
    return [
        problem
        for wrong, problem in (
            (config.fusion_step and config.core != "ab", "fusion_step: needs core ab"),
            (config.inner_rank and config.core == "u", "inner_rank: needs core ab"),
            ("init" in changed and config.core == "u", "init: needs core ab"),
            (
                "damping" in changed and config.coordinates != "natural",
                "damping: needs --coordinates natural",
            ),
            (
                "tau" in changed and not _has_parameter(config, "tau"),
                f"tau: needs magnorm bounded, got {config.magnorm}",
            ),
            (
                config.dropout and config.magnorm not in (None, "none"),
                f"dropout: needs magnorm none, got {config.magnorm}",
            ),
            (
                METHODS[config.method].trains_all_weights and config.dtype == "float16",
                f"dtype: {config.method} takes bfloat16 or float32; float16 gradients underflow",
            ),
            (
                config.eval_steps and not held_out,
                "eval_steps: give --eval-data or --eval-split to evaluate on",
            ),
            (
                config.basis and not _is_readable(config.basis),
                f"basis: no basis file {config.basis} that can be read; make it with secura-basis",
            ),
            (
                config.basis and config.selection != "calibrated",
                f"selection: {config.selection} takes no basis file; leave out --basis, or take "
                "calibrated",
            ),
            (
                config.basis and "selection_seed" in changed,
                "selection_seed: not with --basis, whose file has its own seed",
            ),
            (config.patience and not config.eval_steps, "patience: needs --eval-steps"),
            *(
                (name in changed and not config.push_to, f"{name}: needs --push-to")
                for name in ("push_name", "push_every")
            ),
            *(
                (name in changed and not config.retain, f"{name}: needs --retain above 0")
                for name in changed
                if name.startswith("retain_")
            ),
            (
                "retain_length" in changed and "retain_data" in changed,
                "retain_length: needs --retain-data self; a file has --max-length",
            ),
            (
                config.layers and config.target_modules() == "all-linear",
                "layers: needs --targets by name, as in PEFT",
            ),
        )
        if wrong
    ] + _parameter_problems(config, tau_too="tau" in changed)


def _is_readable(file: str) -> bool:
    return os.path.isfile(file) and os.access(file, os.R_OK)


def _parameter_problems(config: TrainConfig, *, tau_too: bool) -> list[str]:
    """Report ``magnorm_parameters`` that the mode does not have, or that are given twice."""
    if not config.magnorm_parameters:
        return []
    from secura_serve.method import get_mode, mode_names

    # An unknown mode is reported as such.
    known = config.magnorm in mode_names()
    allowed = get_mode(str(config.magnorm)).parameters if known else {}
    names = [pair.partition("=")[0] for pair in config.magnorm_parameters.split(",")]
    problems = [
        f"magnorm_parameters: magnorm {config.magnorm} has no parameter {name!r}; allowed: "
        f"{', '.join(allowed) or 'none'}"
        for name in dict.fromkeys(names)
        if known and name not in allowed
    ]
    if twice := {name for name in names if names.count(name) > 1}:
        problems.append(f"magnorm_parameters: {', '.join(sorted(twice))} is given twice")
    if tau_too and "tau" in names:
        problems.append("tau: given in magnorm_parameters, too; leave one of them out")
    return problems


def layer_ranges(text: str) -> list[tuple[int, int]]:
    """Return the first and last number of each part of ``0,2,8-11``."""
    ends = [[int(end) for end in part.split("-")] for part in text.split(",")]
    return [(end[0], end[-1]) for end in ends]
