"""Recipes: settings in a YAML or JSON file, or a ``train.json``, and what flags change in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from secura_serve.errors import ConfigError
from secura_serve.train.sequence import SequenceConfig
from secura_serve.train.settings import TrainConfig, of_another_method

__all__ = ["SEQUENCE_ONLY", "parse_changes", "read_recipe"]

SEQUENCE_ONLY = {item.name for item in fields(SequenceConfig)} - {
    item.name for item in fields(TrainConfig)
}
_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")


def read_recipe(file: str, over: Mapping[str, Any]) -> dict[str, Any]:
    """The settings in ``file`` that still have a meaning once ``over`` is put on top of them.

    With another ``method`` goes what belongs to the recipe's own, its learning rate included; with
    ``data`` go the tasks of a sequence, and with ``tasks`` the data of a single run.

    Raises:
        ConfigError: it cannot be read, holds something else, or names a file that is not there.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        """PyYAML keeps the last of equal keys and says nothing."""

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            seen = set[Any]()
            for key, _ in node.value:
                if (name := self.construct_object(key)) in seen:
                    raise yaml.YAMLError(f"{name} stands there twice{key.start_mark}")
                seen.add(name)
            found: dict[Any, Any] = super().construct_mapping(node, deep)
            return found

    try:
        # Every JSON file is a YAML file. An open file has its name in YAML's messages.
        with Path(file).open(encoding="utf-8") as text:
            values = yaml.load(text, Loader)
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        raise ConfigError(f"--config {file} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"--config {file} must hold a mapping of settings")
    # A train.json is a recipe too.
    inner = values.get("config", values)
    kept = _fitting(dict(inner) if isinstance(inner, dict) else values, over)
    if lost := _lost(kept, over):
        raise ConfigError(f"--config {file} is not complete:", lost)
    return kept


def _fitting(recipe: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    gone = set[str]()
    method = over.get("method", (old := recipe.get("method", "curlora")))
    if method != old:
        gone |= of_another_method(str(method))
    if "data" in over and "tasks" not in over:
        gone |= SEQUENCE_ONLY
    if "tasks" in over:
        gone |= {"data", "eval_data"}
    if "eval_split" in over:
        gone |= {"eval_data"}
    return {key: value for key, value in recipe.items() if key not in gone}


def _lost(recipe: dict[str, Any], over: Mapping[str, Any]) -> list[str]:
    return [
        f"{key}: {name} is not there; a train.json keeps no folders, so give "
        f"--{key.replace('_', '-')} FILE"
        for key in ("data", "eval_data")
        if key not in over
        and isinstance(name := recipe.get(key), str)
        and name.endswith(_SUFFIXES)
        and not Path(name).exists()
    ]


def parse_changes(pairs: Sequence[str]) -> dict[str, Any]:
    """``KEY=VALUE`` of each ``--set``, the value read as YAML.

    Raises:
        ConfigError: with every pair that is not one.
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
    return values
