"""Proves that an adapter folder survives a round trip and that nothing damaged or hostile is
ever loaded, and nothing half-written ever left: truncation, NaN, wrong shapes, pickles, path
traversal, hostile JSON, another base, a killed process, a full disk.

Needs torch and safetensors only; POSIX for the killed process.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from secura_serve.adapter import (
    AdapterConfig,
    CURModule,
    compare_modules,
    fingerprint,
    load,
    save,
    verify,
    weights_digest,
)
from secura_serve.adapter.format import CONFIG_NAME, WEIGHTS_NAME
from secura_serve.errors import AdapterFormatError, BaseMismatchError, ConfigError
from secura_serve.method import MagNorm, select
from tests.support import ROOT, warm

R = 3
SHAPES = {"model.layers.0.q_proj": (8, 6), "model.layers.0.down_proj": (6, 10)}
Parts = tuple[AdapterConfig, dict[str, CURModule]]


class Base:
    """A base of random matrices, as :class:`secura_serve.adapter.WeightSource`."""

    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.weights = {
            name: torch.randn(shape, generator=generator).to(torch.bfloat16).to(dtype)
            for name, shape in SHAPES.items()
        }

    def shape(self, module: str) -> tuple[int, int]:
        rows, cols = self.weights[module].shape
        return rows, cols

    def weight(self, module: str) -> Tensor:
        return self.weights[module]


def make(base: Base, norm: MagNorm | None = None) -> Parts:
    modules, prints = {}, {}
    for i, name in enumerate(SHAPES):
        W = base.weight(name)
        basis = select(W, R, module=name)
        U = torch.randn(R, R, generator=torch.Generator().manual_seed(i))
        peak = 1.5 if norm and norm.mode == "published" else None
        modules[name] = CURModule(U, basis.rows.int(), basis.cols.int(), peak)
        prints[name] = fingerprint(W, basis)
    config = AdapterConfig(
        base_model_name_or_path="tiny",
        r=R,
        target_modules=("q_proj", "down_proj"),
        base_fingerprint=prints,
        magnorm=norm or MagNorm(),
    )
    return config, modules


@pytest.fixture
def base() -> Base:
    return Base()


@pytest.fixture
def folder(base: Base, tmp_path: Path) -> Path:
    return save(tmp_path / "task", *make(base))


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(folder / WEIGHTS_NAME)
    change(tensors)
    save_file(tensors, folder / WEIGHTS_NAME)


def reconfigure(folder: Path, **changes: Any) -> None:
    raw = json.loads((folder / CONFIG_NAME).read_text()) | changes
    (folder / CONFIG_NAME).write_text(json.dumps(raw))


@pytest.mark.parametrize(
    "norm", [MagNorm(), MagNorm("bounded", tau=0.1), MagNorm("published")], ids=str
)
def test_round_trip(base: Base, tmp_path: Path, norm: MagNorm) -> None:
    config, modules = make(base, norm)
    save(tmp_path / "task", config, modules, extra={"README.md": "a card"})
    found = load(tmp_path / "task")
    digest = weights_digest((tmp_path / "task" / WEIGHTS_NAME).read_bytes())
    assert found.config == replace(config, weights_digest=digest) and found.name == "task"
    for name, cur in modules.items():
        other = found.modules[name]
        assert torch.equal(other.U, cur.U) and other.U.dtype == torch.float32
        assert torch.equal(other.rows, cur.rows) and torch.equal(other.cols, cur.cols)
        assert other.rho_max == cur.rho_max
    assert (tmp_path / "task" / "README.md").read_text() == "a card"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["task"]
    verify(found, base)


def test_the_same_values_in_another_dtype_are_the_same_base(folder: Path) -> None:
    verify(load(folder), Base(dtype=torch.float32))


def test_another_base_is_refused_with_the_first_module(folder: Path) -> None:
    with pytest.raises(BaseMismatchError, match=r"0\.down_proj.*and 1 more"):
        verify(load(folder), Base(seed=1))
    other = Base()
    del other.weights["model.layers.0.down_proj"]
    with pytest.raises(BaseMismatchError, match="no such linear layer"):
        verify(load(folder), other)
    adapter, name = load(folder), "model.layers.0.q_proj"
    kept = {name: adapter.modules[name]}
    assert not compare_modules(kept, adapter.config.base_fingerprint, other).mismatches


def test_every_truncation_is_refused(folder: Path) -> None:
    whole = (folder / WEIGHTS_NAME).read_bytes()
    for length in range(0, len(whole), 7):
        (folder / WEIGHTS_NAME).write_bytes(whole[:length])
        with pytest.raises(AdapterFormatError, match="truncated or damaged"):
            load(folder)


def test_every_truncated_config_is_refused(folder: Path) -> None:
    whole = (folder / CONFIG_NAME).read_bytes().rstrip()
    for length in range(0, len(whole), 7):
        (folder / CONFIG_NAME).write_bytes(whole[:length])
        with pytest.raises(AdapterFormatError):
            load(folder)


KEY = "base_model.model.model.layers.0.q_proj.secura_"
DAMAGE: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "nan": (lambda t: t[KEY + "U"].view(-1)[0].fill_(float("nan")), "NaN or Inf"),
    "inf": (lambda t: t[KEY + "U"].view(-1)[0].fill_(float("inf")), "NaN or Inf"),
    "shape": (lambda t: t.update({KEY + "U": torch.zeros(R, R + 1)}), "expected float"),
    "integer": (lambda t: t.update({KEY + "U": torch.zeros(R, R, dtype=torch.int32)}), "expected"),
    "float8": (lambda t: t.update({KEY + "U": torch.zeros(R, R).to(torch.float8_e5m2)}), "float"),
    "rho": (lambda t: t.update({KEY + "rho_max": torch.zeros(1).cfloat()}), "must be one float"),
    "int64": (lambda t: t.update({KEY + "rows": t[KEY + "rows"].long()}), "expected int32"),
    "short": (lambda t: t.update({KEY + "cols": t[KEY + "cols"][:1].clone()}), "expected int32"),
    "twice": (lambda t: t[KEY + "rows"].fill_(1), "distinct"),
    "negative": (lambda t: t[KEY + "rows"][0].fill_(-1), "not negative"),
    "missing": (lambda t: t.pop(KEY + "cols"), "secura_cols missing"),
    "foreign": (lambda t: t.update({"evil.weight": torch.zeros(1)}), "not part of the format"),
    "stray": (lambda t: t.update({KEY + "C": torch.zeros(1)}), "not part of the format"),
    "unknown": (
        lambda t: t.update({k.replace("layers.0", "layers.9"): v.clone() for k, v in t.items()}),
        "no entry in base_fingerprint",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_tensors_are_refused(folder: Path, name: str) -> None:
    change, message = DAMAGE[name]
    rewrite(folder, change)
    with pytest.raises(AdapterFormatError, match=message):
        load(folder)


def test_an_index_beyond_the_base_is_refused(folder: Path, base: Base) -> None:
    rewrite(folder, lambda t: t[KEY + "rows"][0].fill_(10**6))
    with pytest.raises(AdapterFormatError, match="not the file that adapter_config.json"):
        load(folder)
    # Of a folder that names no digest.
    reconfigure(folder, weights_digest=None)
    with pytest.raises(BaseMismatchError, match="beyond the base's shape"):
        verify(load(folder), base)


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "version": ({"format_version": 99}, "format_version is 99"),
    "type": ({"peft_type": "LORA"}, "peft_type is 'LORA'"),
    "rank": ({"r": 0}, "r: got 0"),
    "huge rank": ({"r": 10**400}, "r: got"),
    "boolean rank": ({"r": True}, "r: got True"),
    "alpha": ({"alpha": "fast"}, "alpha: got 'fast'"),
    "nan alpha": ({"alpha": float("nan")}, "alpha: got nan"),
    "huge alpha": ({"alpha": 10**400}, "alpha: got"),
    "core": ({"core": ["u"]}, "core: got"),
    "ab without m": ({"core": "ab"}, "inner_rank"),
    "unknown key": ({"use_dora": True}, "'use_dora': unknown key"),
    "norm": ({"magnorm": {"mode": "loud"}}, "unknown magnorm mode"),
    "norm key": ({"magnorm": {"mode": "bounded", "x": 1}}, "magnorm needs"),
    "huge tau": ({"magnorm": {"mode": "bounded", "tau": 10**400}}, "magnorm.tau"),
    "selection": ({"selection": {"rule": "x", "seed": 0}}, "selection: got"),
    "targets": ({"target_modules": "q_proj"}, "target_modules: got"),
    "prints": ({"base_fingerprint": {}}, "base_fingerprint: got"),
    "digest": ({"base_fingerprint": {"m": 3}}, "base_fingerprint: got"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_hostile_configs_are_refused(folder: Path, name: str) -> None:
    changes, message = CONFIGS[name]
    reconfigure(folder, **changes)
    with pytest.raises(AdapterFormatError, match=message):
        load(folder)


@pytest.mark.parametrize(
    "text", ["", "[]", "null", "{" * 100_000, '{"a": ' * 100_000, "\ud800", "9" * 10_000]
)
def test_hostile_json_is_refused(folder: Path, text: str) -> None:
    (folder / CONFIG_NAME).write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(AdapterFormatError):
        load(folder)


def test_a_giant_config_is_not_even_read(folder: Path) -> None:
    with (folder / CONFIG_NAME).open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(AdapterFormatError, match="over"):
        load(folder)


def test_all_problems_are_told_at_once(folder: Path) -> None:
    reconfigure(folder, r=0, core="x", nonsense=1)
    with pytest.raises(AdapterFormatError) as caught:
        load(folder)
    assert all(word in str(caught.value) for word in ("r: got 0", "core: got", "'nonsense'"))


def test_pickles_are_never_opened(folder: Path, tmp_path: Path) -> None:
    witness = tmp_path / "witness"

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (witness,)

    (folder / WEIGHTS_NAME).unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(AdapterFormatError, match=r"adapter_model\.bin: pickles are refused"):
        load(folder)
    (folder / WEIGHTS_NAME).write_bytes(pickle.dumps(Evil()))
    with pytest.raises(AdapterFormatError, match="damaged"):
        load(folder)
    assert not witness.exists()


@pytest.mark.parametrize("name", ["..", ".hidden", "a b", "-x", "x" * 65, "é", "a\n"])
def test_names_that_could_leave_the_folder_are_refused(
    base: Base, tmp_path: Path, name: str
) -> None:
    with pytest.raises(ConfigError, match="not allowed"):
        save(tmp_path / "sub" / name, *make(base))
    assert not list(tmp_path.iterdir())


def test_what_could_not_be_read_back_is_not_written(base: Base, tmp_path: Path) -> None:
    config, modules = make(base)
    name = next(iter(modules))
    bad = modules | {name: replace(modules[name], U=torch.full((R, R), float("nan")))}
    for wrong in (bad, {}):
        with pytest.raises(AdapterFormatError, match="cannot be saved"):
            save(tmp_path / "task", config, wrong)
    assert not list(tmp_path.iterdir())


def test_overwriting_is_asked_for(base: Base, folder: Path) -> None:
    config, modules = make(base)
    with pytest.raises(ConfigError, match="exists"):
        save(folder, config, modules)
    save(folder, config, modules, extra={"new.txt": "x"}, overwrite=True)
    assert (folder / "new.txt").exists()
    assert [p.name for p in folder.parent.iterdir()] == ["task"]


@pytest.mark.parametrize("step", ["save_file", "fsync"])
def test_a_full_disk_leaves_the_old_adapter(
    base: Base, folder: Path, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch if step == "save_file" else os, step, full)
    config, modules = make(base)
    changed = {name: replace(cur, U=cur.U + 1) for name, cur in modules.items()}
    with pytest.raises(OSError, match="No space"):
        save(folder, config, changed, overwrite=True)
    monkeypatch.undo()
    name = next(iter(modules))
    assert torch.equal(load(folder).modules[name].U, modules[name].U)
    assert [p.name for p in folder.parent.iterdir()] == ["task"]


_KILLED = """
import os, signal, sys
from pathlib import Path
from tests.adapter import test_adapter_store as here
from safetensors import torch as files
from secura_serve.system import atomic
from secura_serve.adapter import save
step = sys.argv[2]
def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)
if step == "fsync":
    os.fsync = die
else:
    setattr(atomic if step == "put_in_place" else files, step, die)
save(Path(sys.argv[1]), *here.make(here.Base()), overwrite=True)
"""


@pytest.mark.long
@pytest.mark.parametrize("step", ["save_file", "fsync", "put_in_place"])
def test_a_killed_save_leaves_no_half_adapter(folder: Path, tmp_path: Path, step: str) -> None:
    before = load(folder)
    target = tmp_path / "fresh" if step == "save_file" else folder
    done = subprocess.run(
        [warm.python(), "-c", _KILLED, str(target), step],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "fresh").exists()
    after = load(folder)
    for name, cur in before.modules.items():
        assert torch.equal(after.modules[name].U, cur.U)
