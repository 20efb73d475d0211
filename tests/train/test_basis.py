"""Proves calibrated bases: the energies against a float64 loop over tokens that uses no hooks, with
gradients by finite differences, on Llama, biased Qwen2 and GPT-2's Conv1D; the file is the same
each time and is refused when it is damaged or of another base; what is trained on it is loaded,
verified, merged and run without it.

Needs peft and transformers; tiny random models, and the shipped basis of the embedded base.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from torch import Tensor, nn

from secura_serve import adapter
from secura_serve.bases import EMBEDDED, resolve_base
from secura_serve.checkpoint import Checkpoint
from secura_serve.errors import BaseMismatchError, BasisFormatError, ConfigError, UnservableError
from secura_serve.evaluate.config import EvalConfig
from secura_serve.evaluate.models.local import Local
from secura_serve.merge.main import main as merge
from secura_serve.method import importance, order_indices
from secura_serve.train import SecuraConfig, TrainConfig, adapter_layers
from secura_serve.train.basis.config import BasisConfig
from secura_serve.train.basis.energies import linears, measure, weight_of
from secura_serve.train.basis.main import main as make
from secura_serve.train.basis.make import SHIPPED
from secura_serve.train.data.base_text import BaseText
from secura_serve.train.main import main as train
from tests.support.training import PAIRS, flags, write
from tests.support.tuning import SHAPES, TOKENS, base, logits, shake

TEXT = BaseText(TOKENS, 2)
SMALL = ("--sequences", "4", "--length", "12", "--device", "cpu", "--dtype", "float32")


class Tapped(nn.Module):
    """A linear that keeps its input, and adds something to its output."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.added = torch.zeros(
            *TOKENS.shape, weight_of(inner).shape[0], dtype=torch.float64, requires_grad=True
        )

    def forward(self, x: Tensor) -> Tensor:
        self.x = x.detach()
        out: Tensor = self.inner(x) + self.added
        return out


def loss(model: Any) -> Tensor:
    """Cross-entropy of all tokens behind the first two, summed."""
    probabilities = model(TOKENS, use_cache=False).logits.log_softmax(-1)
    parts = [
        -probabilities[row, place - 1, TOKENS[row, place]]
        for row in range(TOKENS.shape[0])
        for place in range(TEXT.start, TOKENS.shape[1])
    ]
    return torch.stack(parts).sum()


@pytest.mark.long
@pytest.mark.parametrize("arch", list(SHAPES))
def test_the_energies_are_those_of_a_plain_loop(arch: str) -> None:
    model = base(arch)
    head = model.get_output_embeddings()
    sums = measure(model, TEXT, gradients=True, batch_size=1)
    forward_only = measure(model, TEXT)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    names = [n for n, m in model.named_modules() if m in linears(model).values()]
    assert names == list(sums) and head not in linears(model).values()
    for name in names:
        parent = model.get_submodule(name.rpartition(".")[0])
        leaf = name.rpartition(".")[2]
        tapped = Tapped(getattr(parent, leaf))
        setattr(parent, leaf, tapped)
        (g,) = torch.autograd.grad(loss(model), tapped.added)
        x, W = tapped.x.flatten(0, -2), weight_of(tapped.inner)
        if name == names[-1]:
            # The gradient itself, at one entry. Llama's norms run in float32.
            with torch.no_grad():
                found = []
                for step in (0.02, -0.02):
                    tapped.added[1, 3, 2] += step
                    found.append(float(loss(model)))
                    tapped.added[1, 3, 2] -= step
            assert float(g[1, 3, 2]) == pytest.approx((found[0] - found[1]) / 0.04, rel=2e-3)
        setattr(parent, leaf, tapped.inner)
        rows, cols = torch.zeros(W.shape[0]).double(), torch.zeros(W.shape[1]).double()
        for token, slope in zip(x, g.flatten(0, -2), strict=True):
            for i in range(W.shape[0]):
                rows[i] += (W[i] * token).sum() ** 2
            for j in range(W.shape[1]):
                cols[j] += (W[:, j] * slope).sum() ** 2
        torch.testing.assert_close(sums[name].rows, rows, rtol=1e-9, atol=1e-14)
        torch.testing.assert_close(sums[name].cols, cols, rtol=1e-9, atol=1e-14)
        torch.testing.assert_close(forward_only[name].rows, rows, rtol=1e-9, atol=1e-14)
        assert not forward_only[name].cols.any()


def made(base_folder: Path, out: Path, *more: str) -> adapter.CalibratedBasis:
    assert make(["--base", str(base_folder), "--out", str(out), *SMALL, *more]) == 0
    return adapter.load_basis(out)


@pytest.mark.long
def test_the_file_is_the_same_each_time_and_ranks_every_index(
    tiny_base: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_base("qwen2")
    first = made(folder, tmp_path / "a.safetensors")
    assert f"basis {first.digest}, 14 linear layers" in capsys.readouterr().out
    again = made(folder, tmp_path / "b.safetensors")
    assert first.digest == again.digest and first.selection == again.selection
    assert first.facts["settings"]["sequences"] == 4 and first.facts["base"] == str(folder)
    assert first.facts["command"].endswith(
        "a.safetensors --sequences 4 --length 12 --dtype float32"
    )
    checkpoint = Checkpoint(folder)
    assert set(first.rankings) == set(checkpoint.linears())
    for name, (rows, cols, usable_rows, usable_cols) in first.rankings.items():
        W = checkpoint.weight(name)
        assert sorted(rows) == list(range(W.shape[0])) and usable_rows == W.shape[0]
        # The columns of every other adapter with this seed.
        plain = order_indices(importance(W, "col"), "inverse_sampled", f"0|{name}|col")
        assert np.array_equal(cols, plain) and usable_cols == W.shape[1]
    others = [
        made(folder, tmp_path / f"{n}.safetensors", *more).digest
        for n, more in enumerate(
            [("--rows", "relative"), ("--columns", "gradient"), ("--seed", "1")]
        )
    ]
    assert len({first.digest, *others}) == 4


@pytest.mark.long
def test_a_dead_row_comes_last(tiny_base: Callable[[str], Path], tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_base("llama"))
    name = "model.layers.0.mlp.up_proj"
    model.get_submodule(name).weight.data[[7, 3]] = 0
    folder = tmp_path / "base"
    shutil.copytree(tiny_base("llama"), folder)
    model.save_pretrained(folder)
    rows, _, usable, _ = made(folder, tmp_path / "x.safetensors").rankings[name]
    assert rows[-2:].tolist() == [3, 7] and usable == len(rows) - 2


@pytest.mark.long
def test_a_file_that_is_not_whole_or_not_of_this_base_is_refused(
    tiny_base: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "basis.safetensors"
    basis = made(tiny_base("llama"), file)
    name = "model.layers.1.mlp.down_proj"
    W = Checkpoint(tiny_base("llama")).weight(name)
    assert basis.ranking(name, W) is basis.rankings[name]
    # As it is in a base that was loaded in bfloat16.
    assert basis.ranking(name, W.bfloat16()) is basis.rankings[name]
    with pytest.raises(BaseMismatchError, match="another base.*other weights.*secura-basis"):
        basis.ranking(name, Checkpoint(tiny_base("mistral")).weight(name))
    with pytest.raises(BaseMismatchError, match="instead of"):
        basis.ranking(name, W[:-1])
    with pytest.raises(ConfigError, match="lm_head: the basis does not rank this layer"):
        basis.ranking("lm_head", W)

    (short := tmp_path / "short").write_bytes(file.read_bytes()[:-5])
    tensors = load_file(file)
    with safe_open(file, "np") as handle:
        metadata = handle.metadata()
    facts = json.loads(metadata["secura_basis"])
    rows = tensors[f"{name}.rows"]
    swapped = rows.copy()
    swapped[[0, 1]] = swapped[[1, 0]]
    doubled = rows.copy()
    doubled[0] = doubled[1]
    newer = {"secura_basis": json.dumps(facts | {"format_version": 2})}
    cases: dict[str, tuple[dict[str, Any], dict[str, str] | None, str]] = {
        "swapped": (tensors | {f"{name}.rows": swapped}, metadata, "was changed"),
        "doubled": (tensors | {f"{name}.rows": doubled}, metadata, "each index once"),
        "one_lost": (tensors, None, "holds no basis"),
        "less": (
            {k: v for k, v in tensors.items() if k != f"{name}.cols"},
            metadata,
            "cols is missing",
        ),
        "more": (tensors | {"x": rows}, metadata, "was changed"),
        "newer": (tensors, newer, "format_version is 2"),
    }
    for case, (content, described, said) in cases.items():
        save_file(content, tmp_path / case, described)
        with pytest.raises(BasisFormatError, match=said):
            adapter.load_basis(tmp_path / case)
    with pytest.raises(BasisFormatError, match="fetch it again"):
        adapter.load_basis(short)
    with pytest.raises(ConfigError, match="no basis file"):
        adapter.load_basis(tmp_path / "nowhere")

    data, out = write(tmp_path / "d.jsonl", PAIRS), tmp_path / "out"
    for base_name, more, status, said in (
        ("mistral", ["--basis", str(file)], 1, "made from another base"),
        ("llama", ["--basis", str(short)], 1, "not a whole basis file"),
        ("llama", ["--basis", str(file), "--rank", "999"], 2, "so choose 1 <= r <="),
        ("llama", ["--basis", str(file), "--selection-seed", "2"], 2, "its own seed"),
        ("llama", ["--basis", str(file), "--method", "lora"], 2, "basis: not supported"),
    ):
        assert train(flags(tiny_base(base_name), data, out, *more)) == status
        assert said in capsys.readouterr().err and not out.exists()
    with pytest.raises(ConfigError, match="exists; choose another --out"):
        BasisConfig(base="x", out=str(file)).check_out()


@pytest.mark.long
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_an_adapter_needs_the_file_only_to_be_trained(
    arch: str, tiny_base: Callable[[str], Path], tmp_path: Path
) -> None:
    file, folder, out = tmp_path / "basis.safetensors", tiny_base(arch), tmp_path / "mine"
    basis = made(folder, file)
    data = write(tmp_path / "d.jsonl", PAIRS)
    argv = flags(folder, data, out, "--basis", str(file), "--learning-rate", "0.3")
    assert train(argv) == 0
    recipe = json.loads((out / "train.json").read_text())
    assert recipe["config"]["basis"] == file.name and recipe["data_sha256"]["basis"]
    assert recipe["config"]["selection"] == "calibrated"
    # One that an earlier version wrote has no basis.
    assert TrainConfig.upgrade({"rank": 8})["basis"] is None
    # The same again changes nothing; it is finished.
    assert train([*argv, "--resume", "auto"]) == 0
    file.unlink()

    trained = adapter.load(out)
    assert trained.config.selection == {"rule": "calibrated", "seed": 0, "basis": basis.digest}
    for name, cur in trained.modules.items():
        assert np.array_equal(cur.rows, basis.rankings[name].rows[:8])
        assert np.array_equal(cur.cols, basis.rankings[name].cols[:8])
    adapter.verify(trained, Checkpoint(folder))
    with pytest.raises(BaseMismatchError):
        adapter.verify(trained, Checkpoint(tiny_base("mistral")))
    saved = adapter.save(tmp_path / "copy", trained.config, trained.modules)
    assert adapter.load(saved).config == trained.config

    def fresh() -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    tokens = torch.arange(3, 40)[None]
    model = peft.PeftModel.from_pretrained(fresh(), out)
    said = model(tokens).logits.detach()
    assert (said - fresh()(tokens).logits).abs().max() > 1e-3
    in_place = fresh()
    with pytest.raises(UnservableError, match="peft_config=SecuraConfig.from_pretrained"):
        in_place.load_adapter(str(out))
    in_place = fresh()
    in_place.load_adapter(str(out), peft_config=SecuraConfig.from_pretrained(out))
    torch.testing.assert_close(in_place(tokens).logits.detach(), said, rtol=1e-4, atol=1e-4)
    assert merge(["--base", str(folder), "--adapter", str(out), "--out", str(tmp_path / "m")]) == 0
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    # The weights moved by .3 of their norm; sums in float32 come in another order.
    torch.testing.assert_close(merged(tokens).logits.detach(), said, rtol=1e-3, atol=1e-3)
    settings = EvalConfig(
        ("iso-date",), "x", base=str(folder), adapter=(str(out),), dtype="float32"
    )
    drift = Local(settings).drift("mine", ["The old house by the river was sold last year."])
    assert drift.kl is not None and drift.kl > 1e-6
    lora = ["--to-lora", "--base", str(folder), "--adapter", str(out)]
    assert merge([*lora, "--out", str(tmp_path / "lora")]) == 0
    # Its own indices are kept when training goes on and when it is saved again.
    model = peft.PeftModel.from_pretrained(fresh(), out, is_trainable=True)
    model.save_pretrained(tmp_path / "again")
    again = adapter.load(tmp_path / "again")
    assert again.config.selection == trained.config.selection
    for name, cur in again.modules.items():
        assert torch.equal(cur.rows, trained.modules[name].rows)


@pytest.mark.long
def test_a_sequence_of_tasks_has_one_basis(
    tiny_base: Callable[[str], Path], tmp_path: Path
) -> None:
    basis = made(tiny_base("llama"), file := tmp_path / "basis.safetensors")
    for name in ("a.train", "a.test", "b.train", "b.test"):
        write(tmp_path / f"{name}.jsonl", PAIRS[:4])
    argv = flags(tiny_base("llama"), tmp_path, tmp_path / "out", "--basis", str(file))
    argv = argv[:2] + argv[4:]
    argv = [*argv, "--max-steps", "1", "--eval-split", "0"]
    assert train([*argv, "--tasks", "a,b", "--tasks-dir", str(tmp_path)]) == 0
    assert adapter.load(tmp_path / "out").config.selection == basis.selection
    facts = json.loads((tmp_path / "out" / "train.json").read_text())
    assert facts["config"]["basis"] == file.name and "a.train" not in facts["config"]
    assert facts["data_sha256"].keys() == {"a.train", "a.test", "b.train", "b.test", "basis"}


@pytest.mark.long
def test_training_makes_a_basis_once_and_keeps_it(
    tiny_base: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("SECURA_CACHE", str(tmp_path / "cache"))
    data = write(tmp_path / "d.jsonl", PAIRS)

    def selection(name: str) -> dict[str, Any]:
        argv = flags(tiny_base("llama"), data, tmp_path / name, "--selection", "calibrated")
        assert train([*argv, "--max-steps", "1"]) == 0
        return dict(adapter.load(tmp_path / name).config.selection)

    first = selection("first")
    said = capsys.readouterr().err
    (file,) = (tmp_path / "cache" / "rankings").glob("*.safetensors")
    assert "made once" in said and str(file) in said
    assert adapter.load_basis(file).selection == first and first["rule"] == "calibrated"
    made_at = file.stat().st_mtime_ns
    assert selection("second") == first
    assert f"calibrated basis: {file}" in capsys.readouterr().err
    assert file.stat().st_mtime_ns == made_at
    file.write_bytes(file.read_bytes()[:99])
    assert selection("third") == first
    assert "is not used" in capsys.readouterr().err


def test_a_new_adapter_without_the_file_says_what_it_needs() -> None:
    with pytest.raises(ConfigError, match="calibrated also needs basis"):
        SecuraConfig(r=4, selection="calibrated")
    named = {"rule": "calibrated", "seed": 0, "basis": "0" * 32}
    config = SecuraConfig(r=4, target_modules=["q_proj"], selection=named)
    model = peft.get_peft_model(base(), config)
    with pytest.raises(ConfigError, match=r"no rows and columns.*SecuraConfig\(basis="):
        logits(model)


def test_from_python_the_basis_sets_the_selection() -> None:
    model = base()
    rankings, prints = {}, {}
    for name, layer in linears(model).items():
        W = weight_of(layer)
        rows, cols = (np.arange(n)[::-1].copy() for n in W.shape)
        rankings[name] = adapter.basis_file.Ranking(rows, cols, *W.shape)
        prints[name] = adapter.weight_fingerprint(W, rankings[name])
    basis = adapter.CalibratedBasis(rankings, prints, {"base": "tiny", "seed": 5})
    config = SecuraConfig(r=4, target_modules=["q_proj"], basis=basis)
    assert config.selection == {"rule": "calibrated", "seed": 5, "basis": basis.digest}
    model = shake(peft.get_peft_model(model, config))
    for layer in adapter_layers(model, "default").values():
        assert layer.basis("default").rows.tolist() == [31, 30, 29, 28]
    with pytest.raises(BaseMismatchError, match="tiny"):
        peft.get_peft_model(base(seed=1), SecuraConfig(r=4, target_modules=["q_proj"], basis=basis))


def test_the_shipped_basis_is_that_of_the_embedded_base() -> None:
    file = SHIPPED / f"{EMBEDDED}.safetensors"
    basis, checkpoint = adapter.load_basis(file), Checkpoint(resolve_base(EMBEDDED).path)
    assert file.stat().st_size < 2**20
    assert basis.facts["base"] == EMBEDDED and basis.facts["seed"] == 0
    assert basis.facts["command"] == f"secura-basis --base {EMBEDDED} --out {file.name}"
    assert set(basis.rankings) == set(checkpoint.linears())
    for name in basis.rankings:
        basis.ranking(name, checkpoint.weight(name))
