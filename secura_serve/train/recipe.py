"""Recipes: settings in a YAML or JSON file or a ``train.json``, which flags change."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from secura_serve.config import current_names
from secura_serve.errors import ConfigError
from secura_serve.system.os_errors import reason
from secura_serve.train.checks import BEFORE_COORDINATES
from secura_serve.train.continual.config import SequenceConfig
from secura_serve.train.settings import REMOVED, TrainConfig, not_taken_over

__all__ = ["SEQUENCE_ONLY", "parse_changes", "read_recipe"]

SEQUENCE_ONLY = {item.name for item in fields(SequenceConfig)} - {
    item.name for item in fields(TrainConfig)
}
"""The settings that make a run one over several tasks."""
_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")


def read_recipe(file: str, over: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings in ``file`` that still apply once ``over`` is put on top of them.

    If ``over`` names another ``method``, the settings of the recipe's own method are left out, its
    learning rate included; if it names ``data``, so are the tasks of a sequence, and if it names
    ``tasks``, so is the data of a single run. Old names of settings are replaced, with a notice.

    Raises:
        ConfigError: the file cannot be read, is no mapping of settings, or names a data file that
            does not exist.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        """Refuses a key that occurs twice; PyYAML alone keeps the last one and says nothing."""

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            seen = set[Any]()
            for key, _ in node.value:
                if (name := self.construct_object(key)) in seen:
                    raise yaml.YAMLError(f"{name} is given twice{key.start_mark}")
                seen.add(name)
            mapping: dict[Any, Any] = super().construct_mapping(node, deep)
            return mapping

    try:
        # JSON is YAML too. Given an open file, YAML's messages name it.
        with Path(file).open(encoding="utf-8") as text:
            values = yaml.load(text, Loader)
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        raise ConfigError(f"--config {file} cannot be read: {reason(error)}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"--config {file} must hold a mapping of settings")
    # A train.json is a recipe too.
    if isinstance(written := values.get("config"), dict):
        values = BEFORE_COORDINATES | written
    settings = _without_removed(values)
    settings = _applicable(current_names(SequenceConfig, settings), over)
    if missing := _missing_files(settings, over):
        raise ConfigError(f"--config {file} is not complete:", missing)
    return settings


def _without_removed(recipe: dict[str, Any]) -> dict[str, Any]:
    """Return ``recipe`` without the settings that this version no longer has."""
    for name in recipe.keys() & REMOVED.keys():
        print(f"notice: {name} is ignored: {REMOVED[name]}", file=sys.stderr)
    return {key: value for key, value in recipe.items() if key not in REMOVED}


def _applicable(recipe: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    left_out = set[str]()
    method = over.get("method", (old := recipe.get("method", "curlora")))
    if method != old:
        left_out |= not_taken_over(str(method))
    if "data" in over and "tasks" not in over:
        left_out |= SEQUENCE_ONLY
    if "tasks" in over:
        left_out |= {"data", "eval_data"}
    if "eval_split" in over:
        left_out |= {"eval_data"}
    return {key: value for key, value in recipe.items() if key not in left_out}


def _missing_files(recipe: dict[str, Any], over: Mapping[str, Any]) -> list[str]:
    return [
        f"{key}: {name} does not exist; a train.json keeps no folders, so give "
        f"--{key.replace('_', '-')} FILE"
        for key in ("data", "eval_data", "retain_data")
        if key not in over
        and isinstance(name := recipe.get(key), str)
        and name.endswith(_SUFFIXES)
        and not os.path.exists(name)
    ]


def parse_changes(pairs: Sequence[str]) -> dict[str, Any]:
    """Return the settings of ``KEY=VALUE`` pairs, as ``--set`` takes them; values are YAML.

    Raises:
        ConfigError: listing every pair that is not valid.
    """
    import yaml

    values, problems = {}, []
    for pair in pairs:
        key, equals, text = pair.partition("=")
        try:
            values[key.strip().replace("-", "_")] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            problems.append(f"{pair}: {error}")
        if not equals:
            problems.append(f"{pair}: must be KEY=VALUE")
    if problems:
        raise ConfigError("--set is not valid:", problems)
    return current_names(SequenceConfig, values)
