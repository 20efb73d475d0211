"""Proves the PEFT tuner: the forward pass equals the merged weights on Llama, biased Qwen2 and
GPT-2's transposed Conv1D, for each core and norm; folders on disk round-trip and refuse another
base; merging is undone bit for bit; PEFT's closed enum takes the new member.

Needs peft and transformers; tiny random models in memory.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

from secura_serve import adapter
from secura_serve.errors import (
    AdapterFormatError,
    BaseMismatchError,
    ConfigError,
    UnservableError,
)
from secura_serve.method import MagNorm, merged, select
from secura_serve.train import SecuraConfig, SecuraModel, adapter_layers, extend_peft_type
from tests.support.tuning import SHAPES, TOKENS, R, base, logits, shake, tuned

NORMS: tuple[dict[str, Any] | None, ...] = (
    None,
    {"mode": "bounded", "tau": 0.1},
    {"mode": "published"},
)


def test_the_enum_takes_one_new_member() -> None:
    assert peft.__version__.startswith("0.21."), "check extend_peft_type against this PEFT"
    member = extend_peft_type("SECURA")
    assert member is extend_peft_type("SECURA") is peft.PeftType.SECURA is peft.PeftType("SECURA")
    assert member == "SECURA" and isinstance(member, peft.PeftType)
    assert list(peft.PeftType).count(member) == 1 and peft.PeftType.LORA is not member
    assert PEFT_TYPE_TO_TUNER_MAPPING[member] is SecuraModel


@pytest.mark.long
@pytest.mark.parametrize("norm", NORMS, ids=lambda n: n["mode"] if n else "none")
@pytest.mark.parametrize("core", ["u", "ab"])
@pytest.mark.parametrize("arch", list(SHAPES))
def test_forward_merge_and_disk_agree(
    arch: str, core: str, norm: dict[str, Any] | None, tmp_path: Path
) -> None:
    plain = logits(base(arch))
    inner = 6 if core == "ab" else None
    model = tuned(base(arch), core=core, inner_rank=inner, magnorm=norm)
    pristine = {n: layer.pristine.clone() for n, layer in adapter_layers(model, "default").items()}
    found = logits(model)
    assert (found - plain).abs().max() > 1e-4

    model.save_pretrained(tmp_path / "task")
    on_disk = adapter.load(tmp_path / "task")
    assert on_disk.config.magnorm == MagNorm.from_json(norm)
    # An independent path: the folder's own tensors merged into a fresh base.
    oracle = base(arch)
    for name, cur in on_disk.modules.items():
        layer = oracle.get_submodule(name)
        W = layer.weight.data.T if arch == "gpt2" else layer.weight.data
        new = merged(
            W, cur.basis, cur.U, on_disk.config.magnorm, peak=cur.rho_max, dtype=torch.float64
        )
        layer.weight.data = new.T.contiguous() if arch == "gpt2" else new
    torch.testing.assert_close(found, logits(oracle), rtol=1e-5, atol=1e-6)

    loaded = PeftModel.from_pretrained(base(arch), tmp_path / "task")
    torch.testing.assert_close(logits(loaded), found, rtol=1e-6, atol=1e-7)
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)

    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(logits(model), found, rtol=1e-6, atol=1e-7)
    model.unmerge_adapter()
    for name, layer in adapter_layers(model, "default").items():
        assert torch.equal(layer.pristine, pristine[name])
    assert torch.equal(logits(model), found)

    whole = loaded.merge_and_unload()
    assert not any("secura" in name for name, _ in whole.named_modules())
    torch.testing.assert_close(logits(whole), found, rtol=1e-6, atol=1e-7)


def test_nothing_but_the_core_is_trained_or_stored() -> None:
    model = tuned(base(dtype=torch.bfloat16), core="ab", inner_rank=5)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert trained and all(".secura_A." in n or ".secura_B." in n for n in trained)
    assert {p.dtype for p in trained.values()} == {torch.float32}
    kept = {n for n in model.state_dict() if "secura" in n}
    assert kept == set(trained)
    model(TOKENS).logits.float().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in trained.values())


@pytest.mark.parametrize("inner", [1, 2])
def test_a_small_inner_rank_limits_the_rank_of_the_update(inner: int, tmp_path: Path) -> None:
    """With m < r it is a LoRA inside the span of C and R, and is written like any other core."""
    model = tuned(base(), core="ab", inner_rank=inner)
    found = logits(model)
    for layer in adapter_layers(model, "default").values():
        assert torch.linalg.matrix_rank(layer.total_delta(["default"]), rtol=1e-5) == inner
        A, B = layer.secura_A["default"], layer.secura_B["default"]
        assert (A.shape, B.shape) == ((R, inner), (inner, R))
    model.save_pretrained(tmp_path / "narrow")
    assert adapter.load(tmp_path / "narrow").config.inner_rank == inner
    loaded = PeftModel.from_pretrained(base(), tmp_path / "narrow")
    torch.testing.assert_close(logits(loaded), found, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("norm", NORMS, ids=lambda n: n["mode"] if n else "none")
def test_a_fresh_adapter_changes_nothing(norm: dict[str, Any] | None) -> None:
    model = get_peft_model(base(), SecuraConfig(r=R, target_modules=["q_proj"], magnorm=norm))
    torch.testing.assert_close(logits(model), logits(base()), rtol=0, atol=1e-12)


def test_gradient_is_that_of_the_merged_weight() -> None:
    """Autograd through the free gather equals autograd through W + C·U·R."""
    grads = []
    for norm in (None, {"mode": "bounded", "tau": 1e9}):
        model = tuned(base(), magnorm=norm)
        model(TOKENS).logits.square().sum().backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], rtol=1e-4, atol=1e-4)


def test_modules_and_bases_are_named_as_in_the_checkpoint() -> None:
    layers = adapter_layers(tuned(base()), "default")
    name = "model.layers.1.mlp.down_proj"
    assert len(layers) == 14
    wanted = select(base().get_submodule(name).weight, R, module=name)
    assert torch.equal(layers[name].basis("default").rows, wanted.rows)
    assert "lm_head" not in layers


@pytest.mark.parametrize("core", ["u", "ab"])
def test_a_loaded_adapter_can_be_trained_on(core: str, tmp_path: Path) -> None:
    """In its own parameters and at its own scale, so that a learning rate keeps its meaning."""
    first = tuned(base(), core=core)
    first.save_pretrained(tmp_path / "task")
    model = PeftModel.from_pretrained(base(), tmp_path / "task", is_trainable=True)
    torch.testing.assert_close(logits(model), logits(first), rtol=1e-6, atol=1e-7)
    shapes = {n: p.shape for n, p in first.named_parameters() if p.requires_grad}
    assert {n: p.shape for n, p in model.named_parameters() if p.requires_grad} == shapes
    for name, layer in adapter_layers(model, "default").items():
        wanted = adapter_layers(first, "default")[name].secura_alpha["default"]
        assert layer.secura_alpha["default"] == pytest.approx(wanted)
    model(TOKENS).logits.sum().backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == set(shapes)
    frozen = PeftModel.from_pretrained(base(), tmp_path / "task")
    assert not any(p.requires_grad for p in frozen.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_another_base_is_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    tuned(base()).save_pretrained(tmp_path / "task")
    PeftModel.from_pretrained(base(dtype=dtype), tmp_path / "task")
    with pytest.raises(BaseMismatchError, match="other weights .and 13 more"):
        PeftModel.from_pretrained(base(seed=1, dtype=dtype), tmp_path / "task")


def test_the_indices_in_the_file_win(tmp_path: Path) -> None:
    model = tuned(base(), selection={"rule": "inverse_sampled", "seed": 7})
    model.save_pretrained(tmp_path / "task")
    text = (tmp_path / "task" / "adapter_config.json").read_text()
    (tmp_path / "task" / "adapter_config.json").write_text(text.replace('"seed": 7', '"seed": 0'))
    loaded = PeftModel.from_pretrained(base(), tmp_path / "task")
    assert torch.equal(logits(loaded), logits(model))


def test_a_damaged_folder_is_refused(tmp_path: Path) -> None:
    model = tuned(base())
    next(iter(adapter_layers(model, "default").values())).secura_U["default"].data[0, 0] = torch.nan
    model.save_pretrained(tmp_path / "task")
    with pytest.raises(AdapterFormatError, match="NaN"):
        PeftModel.from_pretrained(base(), tmp_path / "task")
    (tmp_path / "task" / "adapter_config.json").write_text('{"peft_type": "SECURA"}')
    with pytest.raises(AdapterFormatError, match="format_version"):
        PeftModel.from_pretrained(base(), tmp_path / "task")


@pytest.mark.parametrize(
    "how", [{"target_modules": r".*1\.mlp\.\w+_proj"}, {"layers_to_transform": 1}]
)
def test_patterns_are_written_out_in_full(how: dict[str, Any], tmp_path: Path) -> None:
    settings = {"target_modules": ["gate_proj", "up_proj", "down_proj"]} | how
    model = tuned(base(), **settings)
    assert len(adapter_layers(model, "default")) == 3
    model.save_pretrained(tmp_path / "task")
    assert "model.layers.1.mlp.up_proj" in adapter.load(tmp_path / "task").config.target_modules
    loaded = PeftModel.from_pretrained(base(), tmp_path / "task")
    assert torch.equal(logits(loaded), logits(model))


def test_several_adapters_switch_mix_and_go(tmp_path: Path) -> None:
    model = tuned(base(), target_modules=["q_proj", "down_proj"])
    first = logits(model)
    model.add_adapter("second", SecuraConfig(r=R, target_modules=["q_proj", "down_proj"]))
    shake(model, "second", seed=2)
    assert torch.equal(logits(model), first)
    model.set_adapter("second")
    second = logits(model)
    assert (second - first).abs().max() > 1e-4

    model.base_model.add_weighted_adapter(["default", "second"], [0.3, -1.2], "mix")
    model.set_adapter("mix")
    mixed = logits(model)
    for layer in adapter_layers(model, "mix").values():
        parts = [layer.get_delta_weight(n) for n in ("default", "second", "mix")]
        torch.testing.assert_close(0.3 * parts[0] - 1.2 * parts[1], parts[2], rtol=0, atol=1e-5)
    model.save_pretrained(tmp_path, selected_adapters=["mix"])
    assert adapter.load(tmp_path / "mix").config.core == "u"

    # Two active adapters add up; merging both does the same.
    model.base_model.set_adapter(["default", "second"])
    both = logits(model)
    model.merge_adapter(["default", "second"])
    torch.testing.assert_close(logits(model), both, rtol=0, atol=1e-6)
    model.unmerge_adapter()
    model.set_adapter("mix")
    model.delete_adapter("second")
    assert torch.equal(logits(model), mixed) and not adapter_layers(model, "second")


def test_what_cannot_be_combined_is_refused() -> None:
    targets = ["q_proj"]
    model = tuned(base(), target_modules=targets)
    for name, other in {
        "seed": {"selection": {"rule": "inverse_sampled", "seed": 1}},
        "norm": {"magnorm": {"mode": "bounded"}},
        "wide": {"target_modules": ["q_proj", "k_proj"]},
    }.items():
        model.add_adapter(name, SecuraConfig(**({"r": R, "target_modules": targets} | other)))
        with pytest.raises(UnservableError):
            model.base_model.add_weighted_adapter(["default", name], [1, 1], "mix")
    model.base_model.set_adapter(["default", "norm"])
    with pytest.raises(UnservableError, match="cannot be combined"):
        model(TOKENS)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 0}, "r: got 0"),
        ({"core": "x"}, "core: got"),
        ({"core": "ab", "inner_rank": 0}, "inner_rank: got 0"),
        ({"init": "x"}, "init: got"),
        ({"alpha": "fast"}, "alpha: got"),
        ({"magnorm": {"mode": "bounded", "tau": -1}}, "tau"),
        ({"selection": {"rule": "x", "seed": 0}}, "selection: got"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SecuraConfig(**({"r": R} | settings))


def test_a_mode_may_be_given_by_its_name_alone() -> None:
    assert SecuraConfig(magnorm="bounded").norm == MagNorm("bounded", tau=0.02)
    with pytest.raises(ConfigError, match="must be null or an object such as"):
        SecuraConfig(magnorm=3)


def test_bad_targets_are_refused() -> None:
    with pytest.raises(ConfigError, match="Embedding cannot be adapted"):
        get_peft_model(base(), SecuraConfig(r=R, target_modules=["embed_tokens"]))
    with pytest.raises(ConfigError, match="rank 33 is not allowed"):
        get_peft_model(base(), SecuraConfig(r=33, target_modules=["q_proj"]))
