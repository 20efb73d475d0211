"""Proves that the tuner offers what PEFT's own LoRA offers, or refuses it in words: status, several
adapters, merging in steps, unloading, memory-saving loads, checkpointing, autocast, state dicts.

Needs peft and transformers; tiny random models in memory.
"""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    PeftConfig,
    PeftModel,
    get_layer_status,
    get_model_status,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.utils.hotswap import hotswap_adapter
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from secura_serve.errors import BaseMismatchError, ConfigError, UnservableError
from secura_serve.train import SecuraConfig, SecuraLayer, adapter_layers
from tests.support.engines import random_adapter
from tests.support.tuning import TOKENS, R, base, logits, shake, tuned

TARGETS = ["q_proj", "down_proj"]


@pytest.fixture
def pair() -> Any:
    """Adapters ``default`` and ``second``, the first one active."""
    model = tuned(base(), target_modules=TARGETS)
    model.add_adapter("second", SecuraConfig(r=R, target_modules=TARGETS))
    return shake(model, "second", seed=2)


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {
        n: m.get_base_layer().weight.data.clone()
        for n, m in model.named_modules()
        if isinstance(m, SecuraLayer)
    }


def test_status_and_counts(pair: Any, capsys: pytest.CaptureFixture[str]) -> None:
    status = get_model_status(pair)
    assert status.base_model_type == "LlamaForCausalLM"
    assert status.peft_types == {"default": "SECURA", "second": "SECURA"}
    assert status.num_adapter_layers == 4 and status.trainable_params == 4 * R * R
    assert status.active_adapters == ["default"] and status.merged_adapters == []
    assert status.enabled is True and status.available_adapters == ["default", "second"]
    layer = get_layer_status(pair)[0]
    assert layer.requires_grad == {"default": True, "second": False}
    assert layer.devices == {"default": ["cpu"], "second": ["cpu"]}
    pair.merge_adapter(["second"])
    assert get_model_status(pair).merged_adapters == ["second"]
    pair.unmerge_adapter()
    with pair.disable_adapter():
        assert get_model_status(pair).enabled is False
    pair.print_trainable_parameters()
    assert f"trainable params: {4 * R * R}" in capsys.readouterr().out


def test_merging_in_steps(pair: Any) -> None:
    before, one = weights(pair), logits(pair)
    pair.base_model.set_adapter(["default", "second"])
    both = logits(pair)
    pair.merge_adapter(["default"])
    torch.testing.assert_close(logits(pair), one, rtol=0, atol=1e-6)
    with pytest.warns(UserWarning, match="additionally merging second"):
        pair.merge_adapter(["second"])
    torch.testing.assert_close(logits(pair), both, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="merged"):
        pair.delete_adapter("second")
    # Disabled while merged: the base itself, and the adapters come back afterwards.
    with pair.disable_adapter():
        torch.testing.assert_close(logits(pair), logits(base()), rtol=0, atol=0)
    assert torch.equal(logits(pair), both)
    assert all(torch.equal(value, before[n]) for n, value in weights(pair).items())


def test_a_merge_that_is_refused_changes_nothing() -> None:
    model = tuned(base(), target_modules=["q_proj"])
    model.add_adapter(
        "other", SecuraConfig(r=R, target_modules=TARGETS, magnorm={"mode": "bounded"})
    )
    shake(model, "other")
    before = weights(model)
    for attempt in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(UnservableError, match="cannot be combined"):
            attempt(adapter_names=["other", "default"])
        with pytest.raises(ConfigError, match="no adapter typo; loaded are: default, other"):
            attempt(adapter_names=["typo"])
    assert all(torch.equal(value, before[n]) for n, value in weights(model).items())
    assert get_model_status(model).merged_adapters == []


def test_mixing_is_refused_in_words(pair: Any) -> None:
    mix = pair.base_model.add_weighted_adapter
    with pytest.raises(ConfigError, match="no adapter typo"):
        mix(["typo"], [1.0], "mix")
    with pytest.raises(ConfigError, match="'second' exists"):
        mix(["default"], [1.0], "second")
    with pytest.raises(ConfigError, match="got 'svd', allowed: linear"):
        mix(["default"], [1.0], "mix", combination_type="svd")
    with pytest.raises(UnservableError, match="adapter_names"):
        pair(TOKENS, adapter_names=["default", "second"])
    with pytest.raises(UnservableError, match="adapter_names"):
        pair.generate(TOKENS, adapter_names=["default", "second"], max_new_tokens=2)


def test_unloading(pair: Any, tmp_path: Path) -> None:
    with pair.disable_adapter():
        plain = logits(pair)
    found = logits(pair)
    bare = copy.deepcopy(pair).unload()
    assert torch.equal(logits(bare), plain)
    whole = pair.merge_and_unload(adapter_names=["default"])
    whole.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    for model in (bare, whole, again):
        assert not any("secura" in name for name, _ in model.named_modules())
        assert not hasattr(model, "peft_config")
    torch.testing.assert_close(logits(whole), found, rtol=0, atol=1e-6)
    torch.testing.assert_close(again.state_dict(), whole.state_dict(), rtol=0, atol=0)
    assert get_peft_model(bare, SecuraConfig(r=R, target_modules=TARGETS)) is not None


@pytest.mark.parametrize("core", ["u", "ab"])
@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_loading_across_dtypes_without_extra_memory(
    core: str, trainable: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = tuned(base(), target_modules=TARGETS, core=core)
    model.save_pretrained(tmp_path)
    kept = {"is_trainable": trainable, "low_cpu_mem_usage": True}
    loaded = PeftModel.from_pretrained(base(dtype=dtype), tmp_path, **kept)
    cores = adapter_layers(loaded, "default")
    for name, layer in adapter_layers(model, "default").items():
        assert cores[name].core("default").dtype == torch.float32
        torch.testing.assert_close(cores[name].core("default"), layer.core("default"))
    assert not any(p.is_meta for p in loaded.parameters())
    if trainable:
        loaded(TOKENS).logits.float().sum().backward()
    difference = (logits(loaded).double() - logits(model)).abs().max()
    assert difference < (1e-4 if dtype == torch.float32 else 0.05)


def test_state_dicts_and_injection() -> None:
    model, other = tuned(base(), target_modules=TARGETS), tuned(base(), target_modules=TARGETS)
    shake(other, seed=5)
    set_peft_model_state_dict(other, get_peft_model_state_dict(model))
    torch.testing.assert_close(logits(other), logits(model), rtol=1e-6, atol=1e-7)
    config = SecuraConfig(r=R, target_modules=TARGETS)
    bare = inject_adapter_in_model(config, base())
    assert len(adapter_layers(bare, "default")) == 4
    assert torch.equal(logits(bare), logits(base()))


@pytest.mark.parametrize("norm", [None, {"mode": "bounded"}], ids=["none", "bounded"])
def test_gradient_checkpointing(norm: dict[str, Any] | None) -> None:
    grads = []
    for checkpointing in (False, True):
        model = tuned(base(dtype=torch.float32), magnorm=norm).train()
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": True})
        model(TOKENS).logits.square().sum().backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    torch.testing.assert_close(grads[0], grads[1])


@pytest.mark.parametrize("mode", ["none", "bounded", "published", "activation"])
@pytest.mark.filterwarnings("ignore:S-MagNorm:UserWarning")
def test_autocast(mode: str) -> None:
    model = tuned(base(dtype=torch.float32), magnorm={"mode": mode})
    exact = logits(model)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(TOKENS).logits
        loss.float().square().sum().backward()
    assert loss.dtype == torch.bfloat16
    torch.testing.assert_close(loss.float(), exact, rtol=0.1, atol=0.1)
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(g is not None and g.dtype == torch.float32 and g.isfinite().all() for g in grads)


def test_targets() -> None:
    def names(**how: Any) -> set[str]:
        model = get_peft_model(base(), SecuraConfig(r=R, **how))
        return {name.partition("layers.")[2] for name in adapter_layers(model, "default")}

    assert names(target_modules=["v_proj"]) == {"0.self_attn.v_proj", "1.self_attn.v_proj"}
    assert names(target_modules=r".*\.0\..*(q|v)_proj") == {
        "0.self_attn.q_proj",
        "0.self_attn.v_proj",
    }
    assert names(target_modules=["v_proj"], layers_to_transform=[1]) == {"1.self_attn.v_proj"}
    everything = names(target_modules="all-linear")
    kept = names(target_modules="all-linear", exclude_modules=r".*mlp.*")
    assert kept == {name for name in everything if "mlp" not in name} and len(everything) == 14
    # PEFT's table for the architecture.
    assert names() == {f"{i}.self_attn.{p}_proj" for i in (0, 1) for p in "qv"}


@pytest.mark.long
def test_a_checkpoint_of_the_plain_trainer_can_be_resumed(tmp_path: Path) -> None:
    """transformers' Trainer resumes from the adapter folder and the optimiser's own file."""
    row = {"input_ids": TOKENS[0], "labels": TOKENS[0]}

    def run(core: str, folder: Path, resume: str | None, steps: int) -> Any:
        config = SecuraConfig(r=R, target_modules=TARGETS, core=core)
        model = get_peft_model(base(dtype=torch.float32), config)
        arguments = TrainingArguments(
            folder,
            max_steps=steps,
            learning_rate=0.01,
            lr_scheduler_type="constant",
            save_steps=3,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
        )
        trainer = Trainer(model, arguments, train_dataset=[row] * 64)
        trainer.train(resume_from_checkpoint=resume)
        return model

    whole = run("u", tmp_path / "u", None, steps=6)
    resumed = run("u", tmp_path / "u2", str(tmp_path / "u" / "checkpoint-3"), steps=6)
    for name, layer in adapter_layers(whole, "default").items():
        torch.testing.assert_close(
            adapter_layers(resumed, "default")[name].core("default"),
            layer.core("default"),
            rtol=1e-4,
            atol=1e-7,
        )
    # With core ab the factors are not in the folder: the run goes on, from where it stood.
    run("ab", tmp_path / "ab", None, steps=3)
    run("ab", tmp_path / "ab2", str(tmp_path / "ab" / "checkpoint-3"), steps=5)


def test_a_folder_goes_into_a_living_adapter_of_the_same_basis_only(tmp_path: Path) -> None:
    model = tuned(base(), target_modules=TARGETS)
    model.save_pretrained(tmp_path)
    fresh = get_peft_model(base(), SecuraConfig(r=R, target_modules=TARGETS))
    fresh.load_adapter(tmp_path, "default", is_trainable=True)
    torch.testing.assert_close(logits(fresh), logits(model), rtol=1e-6, atol=1e-7)
    seeded = SecuraConfig(
        r=R, target_modules=TARGETS, selection={"rule": "inverse_sampled", "seed": 1}
    )
    with pytest.raises(BaseMismatchError):
        get_peft_model(base(), seeded).load_adapter(tmp_path, "default", is_trainable=True)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"core": "ab", "magnorm": "bounded"},
        {"selection": "lowest_norm", "magnorm": "published"},
    ],
)
def test_transformers_own_load_adapter(settings: dict[str, Any], tmp_path: Path) -> None:
    model = tuned(base(), target_modules=TARGETS, **settings)
    model.save_pretrained(tmp_path)
    loaded = base()
    loaded.load_adapter(tmp_path)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-6, atol=1e-6)
    assert not torch.allclose(logits(loaded), logits(base()), atol=1e-5)
    other = base()
    other.model.layers[1].self_attn.q_proj.weight.data *= 1.01
    with pytest.raises(BaseMismatchError, match=r"layers\.1\.self_attn\.q_proj"):
        other.load_adapter(tmp_path)
    with pytest.raises(UnservableError, match="is_trainable"):
        base().load_adapter(tmp_path, is_trainable=True)


def test_what_lora_alone_offers_is_refused(pair: Any, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="modules_to_save"):
        SecuraConfig(r=R, modules_to_save=["lm_head"])  # type: ignore[call-arg]
    pair.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Hotswapping only supports LORA"):
        hotswap_adapter(pair, tmp_path / "second", "default")
    with pytest.raises(ValueError, match="SECURA"):
        get_peft_model(base(), SecuraConfig(r=R, target_modules=TARGETS), mixed=True)


class Packed(nn.Linear):
    """As quantised layers are: a ``nn.Linear`` by type, another storage by content."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=False)
        self.weight = nn.Parameter(layer.weight.data.to(torch.float8_e4m3fn), requires_grad=False)


def test_a_quantised_base_is_refused() -> None:
    model = base(dtype=torch.bfloat16)
    attention = model.model.layers[0].self_attn
    attention.q_proj = Packed(attention.q_proj)
    with pytest.raises(ConfigError, match=r"dense W .*float8.*dequantize"):
        get_peft_model(model, SecuraConfig(r=R, target_modules=["q_proj"]))


@pytest.mark.parametrize("kind", ["Linear4bit", "Linear8bitLt"])
@pytest.mark.parametrize("moved", [False, True])
def test_bitsandbytes_is_refused(kind: str, moved: bool) -> None:
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    more = {"has_fp16_weights": False} if kind == "Linear8bitLt" else {}
    model = nn.Sequential()
    model.add_module("linear", getattr(bnb.nn, kind)(64, 32, **more))
    model = model.to("cpu") if moved else model
    with pytest.raises(ConfigError, match=f"{kind} holds no dense W"):
        get_peft_model(model, SecuraConfig(r=R, target_modules=["linear"]))


@pytest.mark.parametrize("reader", [SecuraConfig, PeftConfig])
def test_peft_reads_a_folder_of_ours_without_a_warning(reader, tiny_base, tmp_path):
    folder = random_adapter(tiny_base("llama"), tmp_path / "a", r=4, seed=1)
    assert "weights_digest" in (folder / "adapter_config.json").read_text()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = reader.from_pretrained(str(folder))
    assert isinstance(config, SecuraConfig) and config.r == 4
