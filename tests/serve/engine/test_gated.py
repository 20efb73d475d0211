"""Proves that the step of gate and up moves into the activation after them where, and only where,
an MLP is down(act(gate_up(x))).

Needs vLLM installed; no engine is started.
"""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import nn

from secura_serve.errors import IncompatibleVLLMError
from secura_serve.serve import compat
from secura_serve.serve.engine.gated import take_activations
from secura_serve.serve.engine.layers import CURLinearMixin
from secura_serve.serve.kernels import activation
from secura_serve.serve.kernels.native_kernel import NativeKernel
from secura_serve.serve.kernels.torch_kernel import TorchKernel
from tests.support.interpreted import run
from tests.support.stepping import Linear

WIDTH, IN, TOKENS = 24, 16, 11


class SiluAndMul(nn.Module):
    """Called like vLLM's, which needs an engine's settings."""

    def forward(self, y):
        return activation.gated(y, "silu")


class GeluAndMul(nn.Module):
    """Like vLLM's, its form not given yet."""


class Base(nn.Module):
    """vLLM's linear that the layer wraps."""

    gather_output = skip_bias_add = False
    bias = None

    def __init__(self, W):
        super().__init__()
        self.weight = nn.Parameter(W, requires_grad=False)


class GateUp(CURLinearMixin, nn.Module):
    """gate and up as vLLM's layer with our mixin presents them."""

    n_slices, output_slices, device, R = 2, (WIDTH, WIDTH), torch.device("cpu"), None

    def __init__(self, linear, slots):
        super().__init__()
        self.kernel, self.state, self.active = linear.kernel, linear.state, torch.tensor(True)
        self.bank, self.ranks, self.W = linear.part, linear.ranks, linear.noise(2 * WIDTH, IN)
        self.punica_wrapper = type("Punica", (), {"_token_lora_indices": slots})
        self.base_layer = Base(self.W)

    def _get_quant_method(self):
        return self

    def apply(self, base_layer, x, bias):
        return x @ self.W.T

    def forward(self, x):
        return self.apply_linear(x), None


class Down(nn.Module):
    def forward(self, z):
        return 2 * z, None


def vllms(name):
    """A class of vLLM's models, such as ``llama:LlamaMLP``."""
    module, _, cls = name.partition(":")
    return getattr(importlib.import_module(f"vllm.model_executor.models.{module}"), cls)


class Scaled(nn.Module):
    """Not down(act(gate_up(x))): a tenth more."""

    def forward(self, x):
        y, _ = self.gate_up_proj(x)
        return self.down_proj(self.act_fn(y * 1.1))[0]


def mlp_of(cls, kernel):
    """An MLP with an adapter of two tokens in three, in a model; and its linear."""
    linear = Linear(kernel, (WIDTH, WIDTH), (6, 3), torch.float32, biased=False, fill=(6, 4))
    mlp = cls.__new__(cls)
    nn.Module.__init__(mlp)
    mlp.gate_up_proj = GateUp(linear, torch.arange(TOKENS) % 3 - 1)
    mlp.act_fn, mlp.down_proj = SiluAndMul(), Down()
    return nn.ModuleDict({"mlp": mlp}), linear


def taken(model):
    layer = model["mlp"].gate_up_proj
    return take_activations(nn.ModuleDict({"0": model}), {"0.mlp.gate_up_proj": layer})


def oracle(model, linear, x, scale=1.0):
    layer = model["mlp"].gate_up_proj
    y = linear.wanted(x @ layer.W.T, layer.punica_wrapper._token_lora_indices) * scale
    gate, up = y.chunk(2, dim=1)
    return 2 * gate / (1 + (-gate).exp()) * up


@pytest.fixture(autouse=True)
def no_base_activation(monkeypatch):
    monkeypatch.setattr(activation, "_OWN", {})


@pytest.mark.parametrize("shape", [(TOKENS, IN), (1, TOKENS, IN)])
def test_an_mlp_takes_the_step_in_its_activation(shape):
    model, linear = mlp_of(vllms("llama:LlamaMLP"), TorchKernel())
    mlp, act = model["mlp"], model["mlp"].act_fn
    assert taken(model) == 1 and mlp.gate_up_proj.activation == "silu"
    assert isinstance(mlp, vllms("llama:LlamaMLP")) and activation._OWN["silu"] is act
    x = linear.noise(TOKENS, IN)
    want = oracle(model, linear, x).float()
    compiled = torch.compile(mlp, backend="eager", fullgraph=True)
    for forward in (mlp, compiled):
        torch.testing.assert_close(forward(x.view(shape)).view(want.shape), want)
    # gate and up leave their output to the activation.
    assert torch.equal(mlp.gate_up_proj(x)[0], x @ mlp.gate_up_proj.W.T)


BESIDE = """
import torch
from secura_serve.serve.kernels.triton_kernel import TritonKernel
from tests.serve.engine.test_gated import IN, TOKENS, mlp_of, oracle, taken, vllms

calls = []

class Counted(TritonKernel):
    def linear(self, *given):
        calls.append("activated" if "silu" in given else "linear")
        return super().linear(*given)

for activated, shape in ((True, (TOKENS, IN)), (False, (1, TOKENS, IN))):
    model, linear = mlp_of(vllms("llama:LlamaMLP"), Counted())
    mlp = model["mlp"]
    layer = mlp.gate_up_proj
    layer.takes_linear = True
    # What vLLM loads and a fold changes keeps its one name.
    assert [name for name, _ in layer.named_parameters()] == ["base_layer.weight"]
    assert not activated or taken(model) == 1
    x = linear.noise(TOKENS, IN)
    want = oracle(model, linear, x).float()
    got = mlp(x.view(shape)) if activated else 2 * mlp.act_fn(layer(x.view(shape))[0])
    torch.testing.assert_close(got.view(want.shape), want, rtol=1e-4, atol=1e-4)
assert calls == ["activated", "linear"]
"""


@pytest.mark.long
def test_the_kernel_takes_the_linear_along():
    pytest.importorskip("triton", reason="no triton package")
    run(BESIDE, interpreted=True)


@pytest.mark.parametrize(
    ("cls", "kernel", "scale"),
    [(Scaled, TorchKernel, 1.1), (vllms("qwen2:Qwen2MLP"), NativeKernel, 1.0)],
    ids=["unknown", "native"],
)
def test_elsewhere_the_step_is_taken_at_once(cls, kernel, scale):
    model, linear = mlp_of(cls, kernel())
    assert taken(model) == 0 and type(model["mlp"]) is cls
    x = linear.noise(TOKENS, IN)
    want = oracle(model, linear, x, scale).float()
    torch.testing.assert_close(model["mlp"](x), want)


PLAIN = "llama:LlamaMLP qwen2:Qwen2MLP mistral:MistralMLP gemma:GemmaMLP gemma2:Gemma2MLP "
PLAIN += "gemma3:Gemma3MLP granite:GraniteMLP"
OTHERS = "qwen2_moe:Qwen2MoeMLP falcon_h1:FalconH1MLP"


@pytest.mark.parametrize("name", [*PLAIN.split(), *OTHERS.split()])
def test_the_mlps_of_the_installed_vllm(name):
    model, _ = mlp_of(vllms(name), TorchKernel())
    assert compat.gated_activation(model["mlp"]) == ("silu" if name in PLAIN.split() else None)


def test_other_activations_and_patched_forwards_are_left_alone():
    model, _ = mlp_of(vllms("llama:LlamaMLP"), TorchKernel())
    mlp = model["mlp"]
    mlp.act_fn = GeluAndMul()
    with pytest.raises(IncompatibleVLLMError, match="GeluAndMul.approximate is gone"):
        compat.gated_activation(mlp)
    for form, known in (("none", None), ("tanh", "gelu_tanh")):
        mlp.act_fn.approximate = form
        assert compat.gated_activation(mlp) == known
    mlp.act_fn, mlp.forward = SiluAndMul(), lambda x: x
    assert compat.gated_activation(mlp) is None
