"""Proves what users may import: the exact list of public names, that each of them is there and is
documented, that every error is public, and that a wheel has all that the code needs beside modules.

Needs the training dependencies (SecuraConfig is a PEFT class) and hatchling; no vLLM, no network.
"""

from __future__ import annotations

import ast
import copy
import importlib
import os
import pickle
import subprocess
import sys
import zipfile
from dataclasses import is_dataclass
from pathlib import Path

import pytest

import secura_serve
from secura_serve import errors
from tests.support import ROOT

PUBLIC = """
__version__
Adapter AdapterConfig AdapterError AdapterFormatError BaseMismatchError BaseModelError
BasisFormatError CURModule
Checkpoint ConfigError DataError EvaluationError FoldError IncompatibleVLLMError LifecycleError
MagNorm MergeError MixError Mode Parameter PushError ResolvedBase SecuraConfig SecuraError
ServeError StorageError TrainingError UnservableError
check_merge export_lora fold_stream load_adapter load_basis open_source plan_fold plan_merge
register_kernel register_method register_mode register_rule register_strategy register_task
resolve_base restore_base save_adapter verify_adapter write_merge
"""


def test_the_public_names_are_these() -> None:
    assert sorted(secura_serve.__all__) == sorted(PUBLIC.split())
    assert dir(secura_serve) == sorted(secura_serve.__all__)


def test_every_public_name_is_there_and_documented() -> None:
    for name in secura_serve.__all__:
        value = getattr(secura_serve, name)
        if name != "__version__":
            assert value.__doc__, f"{name} has no docstring"


def test_the_settings_of_a_command_come_from_its_room() -> None:
    for room, name in (
        ("train", "TrainConfig"),
        ("merge", "MergeConfig"),
        ("evaluate", "EvalConfig"),
    ):
        assert is_dataclass(getattr(importlib.import_module(f"secura_serve.{room}"), name))


def test_every_error_is_public() -> None:
    assert set(errors.__all__) <= set(secura_serve.__all__)
    for name in errors.__all__:
        assert issubclass(getattr(secura_serve, name), secura_serve.SecuraError)
        assert name in (errors.__doc__ or "")


def test_a_name_that_is_not_public_is_an_attribute_error() -> None:
    assert not hasattr(secura_serve, "no_such_name")


def test_an_error_passes_between_processes() -> None:
    for name in errors.__all__:
        kind = getattr(errors, name)
        before = kind(409, "why") if issubclass(kind, errors._StatusError) else kind("why")
        before.problems = ("a", "b")
        for after in (pickle.loads(pickle.dumps(before)), copy.copy(before)):
            assert type(after) is kind and str(after) == "why" and vars(after) == vars(before)


ROOMS = ("", "client", "evaluate", "merge", "train")


@pytest.mark.parametrize("room", ROOMS)
def test_type_checkers_see_every_public_name(room: str) -> None:
    """What stands below ``if TYPE_CHECKING`` is what the package loads on first use."""
    package = importlib.import_module(".".join(filter(None, ("secura_serve", room))))
    tree = ast.parse(Path(str(package.__file__)).read_text())
    (block,) = (
        node
        for node in tree.body
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
    )
    seen = set[str]()
    for node in block.body:
        if isinstance(node, ast.ImportFrom):
            seen |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Assign):
            seen |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    if "*" in seen:
        seen |= set(errors.__all__)
    seen = {name for name in seen if name != "*" and not name.startswith("_")}
    assert seen == set(package.__all__) - {"__version__"}


@pytest.mark.slow
def test_a_wrong_use_is_a_type_error(tmp_path: Path) -> None:
    (file := tmp_path / "use.py").write_text(
        "from secura_serve import load_adapter, nonsense, resolve_base\n"
        "from secura_serve.train import Nonsense, TrainConfig\n"
        "from secura_serve.evaluate import load_task\n"
        "load_adapter('folder').config.r.no_such\n"
        "resolve_base(1, nope=4)\n"
        "TrainConfig(base='x', data='y', out='z', rank='w')\n"
        "wrong: int = load_task('iso-date')\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--config-file=", str(file)],
        capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"MYPYPATH": str(ROOT)},
    )  # fmt: skip
    faults = [line for line in done.stdout.splitlines() if line.startswith("use.py")]
    assert {line.split(":")[1] for line in faults} == {"1", "2", "4", "5", "6", "7"}, done.stdout


def test_a_wheel_has_types_and_native_sources(tmp_path: Path) -> None:
    build = "import sys; from hatchling.build import build_wheel; build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, str(tmp_path)], cwd=ROOT, check=True)
    [wheel] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        held = set(file.namelist())
    package = ROOT / "secura_serve"
    needed = {"py.typed"} | {
        str(source.relative_to(package))
        for pattern in ("*.py", "*.c", "*.cpp", "*.h")
        for source in package.rglob(pattern)
    }
    assert {f"secura_serve/{name}" for name in needed} <= held
