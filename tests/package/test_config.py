"""Proves that settings made in Python are held to their allowed values, as those of flags are."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest

from secura_serve.adapter import load
from secura_serve.bases import resolve_base
from secura_serve.errors import AdapterFormatError, BaseModelError, ConfigError, DataError
from secura_serve.evaluate import EvalConfig, load_task
from secura_serve.merge.config import MergeConfig
from secura_serve.serve.app.config import ServeConfig
from secura_serve.system.atomic import check_target, place_problem
from secura_serve.train import SequenceConfig, TrainConfig
from secura_serve.train.basis.config import BasisConfig
from secura_serve.train.data import read

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


def test_the_home_of_nobody_is_a_name_like_any_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shell leaves ``~name`` as it is where there is no such user."""
    monkeypatch.chdir(tmp_path)
    assert ServeConfig(state="~no.such.user/state")
    with pytest.raises(BaseModelError, match="no base model '~no.such.user/base'"):
        resolve_base("~no.such.user/base")
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "base").mkdir()
    with pytest.raises(BaseModelError, match=f"no config.json.*{tmp_path}/base"):
        resolve_base("~/base")


def test_what_cannot_be_an_output_is_told_before_the_work(tmp_path: Path) -> None:
    assert "root of the file system" in str(place_problem(Path("/")))
    (tmp_path / "astray").symlink_to(tmp_path / "nowhere")
    assert "No such file" in str(place_problem(tmp_path / "astray/out"))
    (tmp_path / "file").touch()
    assert "Not a directory" in str(place_problem(tmp_path / "file/out"))
    for fine in ("astray", "file", "new", "new/deep/er"):
        assert place_problem(tmp_path / fine) is None
    assert sorted(os.listdir(tmp_path)) == ["astray", "file"]


def test_a_closed_folder_is_a_wrong_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests may run as root, who may read everything: so the system's answer is put in."""
    (closed := tmp_path / "closed").mkdir()
    look = os.stat

    def guarded(path: Any, *args: Any, **options: Any) -> os.stat_result:
        if isinstance(path, (str, Path)) and closed in Path(path).parents:
            raise PermissionError(13, "Permission denied", str(path))
        return look(path, *args, **options)

    monkeypatch.setattr(os, "stat", guarded)
    with pytest.raises(ConfigError, match="closed cannot be looked into: Permission denied"):
        check_target(closed, True, "train.json")
    with pytest.raises(AdapterFormatError, match="one: cannot be read: Permission denied") as told:
        load(closed / "one")
    assert told.value.wrong_use
    for name in ("x.jsonl", "x.csv", "x.parquet"):
        with pytest.raises(DataError, match="cannot be read") as refused:
            read(str(closed / name))
        assert refused.value.wrong_use
    with pytest.raises(ConfigError, match="tasks: a: no file"):
        SequenceConfig(**NEEDED[SequenceConfig] | {"tasks": f"a={closed}/b:{closed}/c"})
