"""Proves that ``--method full --targets`` trains the weights of the named linear layers alone: each
other tensor of the checkpoint that it writes is the base's, to the last bit.

Needs tiny random checkpoints on disk.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from secura_serve.errors import ConfigError
from secura_serve.train.main import main
from secura_serve.train.methods import checkpoint_tensors, prepare
from secura_serve.train.settings import TrainConfig
from tests.support.training import PAIRS, same, write

TinyBase = Callable[[str], Path]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write(tmp_path / "sums.jsonl", PAIRS)


def argv(base: Path, data: Path, out: Path, *more: str) -> list[str]:
    common = ["--base", str(base), "--data", str(data), "--out", str(out), "--method", "full"]
    sizes = ["--device", "cpu", "--max-steps", "3", "--max-length", "512", "--dtype", "float32"]
    return [*common, *sizes, "--learning-rate", "0.01", *more]


def changed(base: Path, out: Path) -> set[str]:
    before, after = load_file(base / "model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() == after.keys()
    # An output layer that is the embedding is written once.
    assert before.keys() == after.keys()
    return {name for name, value in before.items() if not torch.equal(value, after[name])}


@pytest.mark.parametrize("arch", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize(
    ("flags", "leaves", "layers"),
    [
        (("--targets", "q_proj,down_proj"), {"q_proj", "down_proj"}, None),
        (("--targets", r".*\.1\..*(q_proj|c_attn)"), {"q_proj", "c_attn"}, {"1"}),
        (("--targets", "q_proj,o_proj", "--layers", "0"), {"q_proj", "o_proj"}, {"0"}),
        (("--exclude", "mlp.down_proj,c_proj"), None, None),
    ],
    ids=["names", "expression", "layers", "all but"],
)
def test_only_what_is_named_changes(
    tiny_base: TinyBase, data: Path, tmp_path: Path, arch: str, flags: tuple[str, ...],
    leaves: set[str] | None, layers: set[str] | None,
) -> None:  # fmt: skip
    base, out = tiny_base(arch), tmp_path / "full"
    if arch == "gpt2":
        swap = {"q_proj,down_proj": "c_attn,mlp.c_proj", "q_proj,o_proj": "c_attn,attn.c_proj"}
        flags = tuple(swap.get(flag, flag) for flag in flags)
        names = {"q_proj": "c_attn", "down_proj": "c_proj", "o_proj": "c_proj", "c_attn": "c_attn"}
        leaves = leaves and {names[leaf] for leaf in leaves}
    if "--exclude" in flags and arch != "llama":
        pytest.skip("the same code")
    assert main(argv(base, data, out, *flags)) == 0
    found = changed(base, out)
    assert found and all(name.endswith(".weight") for name in found)
    if leaves is None:
        assert not any("down_proj" in name or "norm" in name or "emb" in name for name in found)
        assert any("gate_proj" in name for name in found)
    else:
        assert {name.split(".")[-2] for name in found} <= leaves
    if layers:
        numbers = {part for name in found for part in name.split(".") if part.isdigit()}
        assert numbers == layers
    facts = json.loads((out / "train.json").read_text())
    weights = load_file(out / "model.safetensors")
    assert facts["trainable_parameters"] == sum(weights[name].numel() for name in found)
    assert "linear layers" in (out / "README.md").read_text()


@pytest.mark.long
def test_a_resumed_run_gives_the_same_bits(tiny_base: TinyBase, data: Path, tmp_path: Path) -> None:
    base = tiny_base("llama")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    flags = ("--targets", "q_proj", "--save-steps", "1")
    assert main(argv(base, data, whole, *flags)) == 0
    config = TrainConfig(
        base=str(base), data=str(data), out=str(parts), method="full", targets="q_proj"
    )
    model = prepare(config).model
    # What a checkpoint holds is what is trained, and not the whole base.
    assert all("q_proj" in name for name in checkpoint_tensors(model))
    assert main(argv(base, data, parts, *flags, "--resume", "auto")) == 0
    assert same(whole, parts)


@pytest.mark.parametrize(
    ("targets", "said"),
    [("nothing", "no linear layer of the base; they are c_attn"), ("lm_head", "is its embedding")],
)
def test_wrong_targets_are_refused(
    tiny_base: TinyBase, data: Path, tmp_path: Path, targets: str, said: str
) -> None:
    config = TrainConfig(
        base=str(tiny_base("gpt2")), data=str(data), out=str(tmp_path / "o"), method="full",
        targets=targets,
    )  # fmt: skip
    with pytest.raises(ConfigError, match=said):
        prepare(config)
