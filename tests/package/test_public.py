"""Proves what users may import: the exact list of public names, that each of them is there and is
documented, that every error is public, and that a wheel has all that the code needs beside modules.

Needs the training dependencies (SecuraConfig is a PEFT class) and hatchling; no vLLM, no network.
"""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

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


def test_every_error_is_public() -> None:
    assert set(errors.__all__) <= set(secura_serve.__all__)
    for name in errors.__all__:
        assert issubclass(getattr(secura_serve, name), secura_serve.SecuraError)
        assert name in (errors.__doc__ or "")


def test_a_name_that_is_not_public_is_an_attribute_error() -> None:
    assert not hasattr(secura_serve, "no_such_name")


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
