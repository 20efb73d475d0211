"""Proves the two S-MagNorm modes on activations: values against scalar loops, derivatives by
gradcheck, training and disk round trip through the tuner, and that nothing merges them.

Needs peft and transformers; tiny random models in memory.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor

from secura_serve import adapter
from secura_serve.errors import ConfigError, UnservableError
from secura_serve.method import MagNorm, apply_to_activations
from secura_serve.train import SecuraConfig, adapter_layers
from tests.support.tuning import R, base, logits, shake, tuned

MODES = ("reference", "activation")
pytestmark = pytest.mark.filterwarnings("ignore:S-MagNorm:UserWarning")


@pytest.fixture
def y() -> Tensor:
    return torch.randn(2, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def delta(y: Tensor) -> Tensor:
    return 0.1 * torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1))


def divisors(y: Tensor, delta: Tensor, norm: MagNorm) -> list[float]:
    rho = [
        abs(d) / (abs(a) + norm.eps)
        for a, d in zip(y.flatten().tolist(), delta.flatten().tolist(), strict=True)
    ]
    inner = [r if norm.mode == "reference" else r / max(rho) - 0.5 for r in rho]
    return [2 - 1 / (1 + math.exp(-norm.scale * z)) for z in inner]


@pytest.mark.parametrize("scale", [6.0, 2.5])
@pytest.mark.parametrize("mode", MODES)
def test_values_are_those_of_scalar_loops(
    mode: str, scale: float, y: Tensor, delta: Tensor
) -> None:
    norm = MagNorm(mode, scale=scale)
    want = [
        (2 * a + d) / res
        for a, d, res in zip(
            y.flatten().tolist(),
            delta.flatten().tolist(),
            divisors(y, delta, norm),
            strict=True,
        )
    ]
    found = apply_to_activations(y, delta, norm)
    torch.testing.assert_close(found.flatten(), torch.tensor(want, dtype=y.dtype))
    low = apply_to_activations(y.bfloat16(), delta.bfloat16(), norm)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.double(), found, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("mode", MODES)
def test_derivatives_treat_the_divisor_as_a_constant(mode: str, y: Tensor, delta: Tensor) -> None:
    norm = MagNorm(mode)
    res = torch.tensor(divisors(y, delta, norm), dtype=y.dtype).view_as(y)

    def plain(a: Tensor, d: Tensor) -> Tensor:
        return (2 * a + d) / res

    inputs = (y.requires_grad_(), delta.requires_grad_())
    assert torch.autograd.gradcheck(plain, inputs)
    wanted = torch.autograd.grad(plain(*inputs).square().sum(), inputs)
    found = torch.autograd.grad(apply_to_activations(*inputs, norm).square().sum(), inputs)
    torch.testing.assert_close(found, wanted)


def test_limits(y: Tensor, delta: Tensor) -> None:
    zero = torch.zeros_like(y, requires_grad=True)
    for mode in MODES:
        fresh = apply_to_activations(y, zero, MagNorm(mode))
        assert torch.equal(fresh, y)
        (slope,) = torch.autograd.grad(fresh.sum(), zero)
        assert torch.equal(slope, torch.ones_like(y))
    tiny = apply_to_activations(y, 1e-12 * delta, MagNorm("reference"))
    torch.testing.assert_close(tiny, y * 4 / 3, rtol=1e-6, atol=0)
    with pytest.raises(ConfigError, match="acts on weights"):
        apply_to_activations(y, delta, MagNorm("bounded"))


@pytest.mark.parametrize("arch", ["qwen2", "gpt2"])
@pytest.mark.parametrize("mode", MODES)
def test_the_tuner_applies_it_to_each_layer(mode: str, arch: str, tmp_path: Path) -> None:
    model = tuned(base(arch), magnorm={"mode": mode})
    layer = next(iter(adapter_layers(model, "default").values()))
    x = torch.randn(2, 3, layer.in_features, dtype=torch.float64)
    W, bias = layer.pristine, layer.base_bias()
    rows, cols = layer.basis("default")
    update = x @ W[rows].T @ layer.core("default").T.double() @ W[:, cols].T
    want = apply_to_activations(x @ W.T + bias, update, MagNorm(mode))
    torch.testing.assert_close(layer(x), want)

    found = logits(model)
    model.save_pretrained(tmp_path / "task")
    assert adapter.load(tmp_path / "task").config.magnorm == MagNorm(mode)
    loaded = PeftModel.from_pretrained(base(arch), tmp_path / "task")
    torch.testing.assert_close(logits(loaded), found)


@pytest.mark.parametrize("mode", [*MODES, "published"])
def test_training_leaves_zero(mode: str) -> None:
    model = get_peft_model(
        base(), SecuraConfig(r=R, target_modules=["q_proj"], magnorm={"mode": mode})
    )
    model(torch.arange(8).view(1, 8)).logits.square().mean().backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(g is not None and g.abs().max() > 0 for g in grads)


def test_nothing_merges_it_and_the_reason_is_told() -> None:
    with pytest.warns(UserWarning, match="reproduction only"):
        config = SecuraConfig(r=R, target_modules=["q_proj"], magnorm={"mode": "activation"})
    model: Any = shake(get_peft_model(base(), config))
    before = logits(model)
    for attempt in (
        model.merge_adapter,
        model.merge_and_unload,
        lambda: model.base_model.add_weighted_adapter(["default"], [1.0], "mix"),
    ):
        with pytest.raises(UnservableError, match="acts on activations"):
            attempt()
    assert torch.equal(logits(model), before) and set(model.peft_config) == {"default"}
