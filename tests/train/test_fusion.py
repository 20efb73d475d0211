"""Proves accumulation with a fusion step and dropout: the running core is the float64 sum over
windows, training goes on from a saved state bit for bit, and dropout drops entries of R·x.

Needs peft and transformers; tiny random models in memory.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments

from secura_serve.errors import ConfigError
from secura_serve.train import SecuraConfig, adapter_layers
from secura_serve.train.callbacks.fusion import Fusion
from secura_serve.train.methods import checkpoint_tensors, restore
from tests.support.tuning import TOKENS, R, base, logits, shake, tuned

TARGETS = ["q_proj", "down_proj"]


def cabr(**settings: Any) -> Any:
    settings = {"r": R, "core": "ab", "inner_rank": 6, "target_modules": TARGETS} | settings
    return get_peft_model(base(dtype=torch.float32), SecuraConfig(**settings))


class Watch(TrainerCallback):
    """Sums A_t·B_t in float64 just before each fusion, and keeps what there was."""

    def __init__(self, every: int) -> None:
        self.every, self.sums, self.moments = every, {}, []

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        for name, layer in adapter_layers(model, "default").items():
            A, B = (p["default"].detach().double() for p in (layer.secura_A, layer.secura_B))
            if state.global_step % self.every == 0:
                self.sums[name] = self.sums.get(name, 0) + A @ B
            slot = optimizer.state[layer.secura_B["default"]]
            self.moments.append(float(slot["exp_avg_sq"].sum()))


def train(model: Any, folder: Path, callbacks: list[TrainerCallback], steps: int) -> None:
    row = {"input_ids": TOKENS[0], "labels": TOKENS[0]}
    arguments = TrainingArguments(
        folder,
        max_steps=steps,
        learning_rate=0.05,
        lr_scheduler_type="constant",
        per_device_train_batch_size=2,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    Trainer(model, arguments, train_dataset=[row] * 64, callbacks=callbacks).train()


def test_the_running_core_is_the_sum_over_windows(tmp_path: Path) -> None:
    model, watch = cabr(), Watch(2)
    before = _kept(model)
    train(model, tmp_path, [watch, Fusion(2)], steps=5)
    after = _kept(model)
    for name, layer in adapter_layers(model, "default").items():
        want = watch.sums[name]
        assert want.abs().max() > 1e-4
        torch.testing.assert_close(
            layer.secura_running["default"].double(), want, rtol=1e-5, atol=1e-7
        )
        last = layer.secura_A["default"].double() @ layer.secura_B["default"].double()
        core = layer.secura_alpha["default"] * (want + last)
        torch.testing.assert_close(layer.core("default").double(), core, rtol=1e-5, atol=1e-7)
        assert not torch.equal(_A(after, name), _A(before, name))
        assert last.abs().max() > 0
    # Adam's moments outlive a fusion: the second is a decaying sum that never starts again.
    assert min(watch.moments[2:]) > 0


def test_at_fusion_step_1_A_never_trains(tmp_path: Path) -> None:
    model = cabr()
    before = _kept(model)
    train(model, tmp_path, [Fusion(1)], steps=4)
    for name, layer in adapter_layers(model, "default").items():
        assert torch.equal(layer.secura_A["default"], _A(before, name))
        assert layer.secura_running["default"].abs().max() > 0
        assert not layer.secura_B["default"].any()


@pytest.mark.parametrize("norm", [None, {"mode": "bounded", "tau": 0.1}])
def test_a_fusion_changes_no_answer(norm: dict[str, Any] | None, tmp_path: Path) -> None:
    model = tuned(base(), core="ab", inner_rank=6, target_modules=TARGETS, magnorm=norm)
    before = logits(model)
    for layer in adapter_layers(model, "default").values():
        layer.fuse("default")
    torch.testing.assert_close(logits(model), before, rtol=1e-6, atol=1e-9)
    kept = {n for n in model.state_dict() if "secura" in n}
    assert kept == {n for n, p in model.named_parameters() if p.requires_grad}
    model.delete_adapter("default")
    assert not any("running" in n for n, _ in model.named_buffers())


@pytest.mark.parametrize("core", ["u", "ab"])
def test_what_a_checkpoint_keeps_is_exact(core: str) -> None:
    settings = {"core": core, "inner_rank": 6 if core == "ab" else None, "target_modules": TARGETS}
    model = tuned(base(), **settings)
    layers = adapter_layers(model, "default")
    if core == "ab":
        for layer in layers.values():
            layer.fuse("default")
            layer.secura_B["default"].data.normal_()
    state = _kept(model)
    found = logits(model)

    other = shake(tuned(base(), **settings), seed=2)
    parameters = [p for p in other.parameters() if p.requires_grad]
    assert not torch.equal(logits(other), found)
    restore(other, state)
    assert torch.equal(logits(other), found)
    assert all(a is b for a, b in zip(parameters, [*_trained(other)], strict=True))
    assert all(torch.equal(v, state[k]) for k, v in _kept(other).items())

    # A state from before the first fusion takes the running core away.
    restore(other, {k: v for k, v in state.items() if "running" not in k})
    assert not any("running" in key for key in _kept(other))
    with pytest.raises(ConfigError, match="lm_head"):
        restore(other, state | {"lm_head.secura_U.default": torch.zeros(1)})


def _kept(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in checkpoint_tensors(model).items()}


def _A(kept: dict[str, torch.Tensor], module: str) -> torch.Tensor:
    (found,) = (v for k, v in kept.items() if k.endswith(f"{module}.secura_A.default"))
    return found


def _trained(model: Any) -> Any:
    return (p for p in model.parameters() if p.requires_grad)


@pytest.mark.long
def test_what_cannot_be_fused_is_refused(tmp_path: Path) -> None:
    model = tuned(base(dtype=torch.float32), target_modules=TARGETS)
    with pytest.raises(ConfigError, match="core 'u'"):
        next(iter(adapter_layers(model, "default").values())).fuse("default")
    with pytest.raises(ConfigError, match=">= 1"):
        Fusion(0)
    for name in ("default", "missing"):
        with pytest.raises(ConfigError, match="has no core 'ab'"):
            train(model, tmp_path, [Fusion(2, name)], steps=1)


@pytest.mark.parametrize("arch", ["qwen2", "gpt2"])
def test_dropout_drops_entries_of_R_x(arch: str) -> None:
    model = tuned(base(arch), dropout=0.25)
    layer = next(iter(adapter_layers(model, "default").values()))
    W, bias = layer.pristine, layer.base_bias()
    rows, cols = layer.basis("default")
    # Orthogonal columns and an invertible core let the mask be read off the output.
    x = torch.randn(64, layer.in_features, dtype=torch.float64)
    layer.train()
    extra = layer(x) - (x @ W.T + bias)
    h = torch.linalg.lstsq(W[:, cols], extra.T).solution
    z = torch.linalg.solve(layer.core("default").double(), h).T / (x @ W[rows].T)
    kept = z.abs() > 0.5
    torch.testing.assert_close(z[kept], torch.full_like(z[kept], 4 / 3), rtol=1e-6, atol=1e-6)
    assert z[~kept].abs().max() < 1e-6 and 0.6 < kept.double().mean() < 0.9
    layer.eval()
    want = x @ W.T + bias + x @ W[rows].T @ layer.core("default").double().T @ W[:, cols].T
    torch.testing.assert_close(layer(x), want)


def test_dropout_settings() -> None:
    for bad in (-0.1, 1.0, "x"):
        with pytest.raises(ConfigError, match="dropout: got"):
            SecuraConfig(r=R, dropout=bad)
    with pytest.raises(ConfigError, match="allowed with none only"):
        SecuraConfig(r=R, dropout=0.1, magnorm={"mode": "bounded"})
