"""Proves that settings made in Python are held to their allowed values, as those of flags are."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from secura_serve.errors import ConfigError
from secura_serve.evaluate import EvalConfig, load_task
from secura_serve.merge.config import MergeConfig
from secura_serve.serve.app.config import ServeConfig
from secura_serve.train import SequenceConfig, TrainConfig
from secura_serve.train.basis.config import BasisConfig

NEEDED: dict[type, dict[str, Any]] = {
    BasisConfig: {"base": "b", "out": "o"},
    EvalConfig: {"tasks": ("iso-date",), "out": "o", "base": "b"},
    MergeConfig: {"base": "b", "adapter": ("a",), "out": "o"},
    SequenceConfig: {"base": "b", "out": "o", "tasks": "a=b:c"},
    ServeConfig: {},
    TrainConfig: {"base": "b", "data": "d", "out": "o"},
}
CHOSEN = [
    pytest.param(cls, item, id=f"{cls.__name__}.{item.name}")
    for cls in NEEDED
    for item in dataclasses.fields(cls)
    if item.metadata.get("choices")
]


@pytest.mark.parametrize("cls, item", CHOSEN)
def test_a_value_outside_the_choices_is_refused_with_all_of_them(
    cls: type, item: dataclasses.Field[Any]
) -> None:
    with pytest.raises(ConfigError) as refused:
        cls(**NEEDED[cls] | {item.name: "nosuch"})
    said = str(refused.value)
    assert "nosuch" in said and all(choice in said for choice in item.metadata["choices"])


def test_there_are_choices_to_try() -> None:
    assert len(CHOSEN) > 10


def test_a_split_that_a_task_has_not_is_refused_with_those_it_has() -> None:
    with pytest.raises(ConfigError, match=r"'tests'.*train, validation, test"):
        load_task("iso-date").rows("tests")  # type: ignore[arg-type]


def test_a_folder_is_no_state_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="state: .* is a folder"):
        ServeConfig(state=str(tmp_path))


BOUNDED = [
    pytest.param(cls, item, id=f"{cls.__name__}.{item.name}")
    for cls in NEEDED
    for item in dataclasses.fields(cls)
    if item.metadata.get("bound")
]
OUTSIDE = (-3, float("nan"), "many", ())


@pytest.mark.parametrize("cls, item", BOUNDED)
def test_a_value_outside_its_bound_is_refused_with_the_bound(
    cls: type, item: dataclasses.Field[Any]
) -> None:
    bound = item.metadata["bound"]
    for value in [value for value in OUTSIDE if not bound.allows(value)] or pytest.fail("none"):
        with pytest.raises(ConfigError) as refused:
            cls(**NEEDED[cls] | {item.name: value})
        assert f"{item.name}: got {value!r}, must be {bound.text}" in str(refused.value)


def test_defaults_are_inside_their_bounds() -> None:
    assert len(BOUNDED) > 35
    for parameter in BOUNDED:
        _, item = parameter.values
        if item.default not in (None, dataclasses.MISSING):
            assert item.metadata["bound"].allows(item.default), item.name
