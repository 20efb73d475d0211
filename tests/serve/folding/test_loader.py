"""Proves ``--load-format secura``: the weights that a merge writes, folded while vLLM loads.

Needs vLLM on a CPU. Bits are compared with secura-merge and with PEFT's merge, logprobs with
transformers on weights folded in float64.
"""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from vllm.config.load import LoadConfig
from vllm.model_executor.model_loader import get_model_loader

from secura_serve.errors import ConfigError, MergeError
from secura_serve.merge.main import main
from secura_serve.method import MagNorm
from secura_serve.serve import plugin
from secura_serve.train import SecuraConfig
from tests.support import agreement
from tests.support.engines import random_adapter, serving

BOUNDED = MagNorm("bounded", tau=0.2)


def loader(adapter):
    plugin.register()
    extra = {"adapter": adapter, "enable_multithread_load": False}
    return get_model_loader(LoadConfig(load_format="secura", model_loader_extra_config=extra))


def loaded(base, adapter, dtype=torch.float32):
    config = SimpleNamespace(model=str(base), revision=None, dtype=dtype)
    # Cloned: what the stream passes through maps the file.
    weights = loader(adapter).get_all_weights(config, torch.nn.Module())
    return {name: tensor.clone() for name, tensor in weights}


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
@pytest.mark.parametrize("norm", [MagNorm(), BOUNDED])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bits_are_those_of_secura_merge_and_of_peft(arch, norm, dtype, tiny_base, tmp_path):
    base = tiny_base(arch)
    adapter = random_adapter(base, tmp_path / "a", r=8, seed=1, magnorm=norm, size=4)
    found = loaded(base, str(adapter), dtype)
    out, kind = tmp_path / "out", str(dtype).removeprefix("torch.")
    flags = ["--base", str(base), "--adapter", str(adapter), "--out", str(out), "--dtype", kind]
    assert main(flags) == 0
    merged = load_file(out / "model.safetensors")
    plain = load_file(base / "model.safetensors")
    assert found.keys() == merged.keys()
    changed = [name for name in plain if not torch.equal(found[name].float(), plain[name])]
    assert len(changed) == (14 if arch == "llama" else 8)
    for name in changed:
        assert found[name].dtype == dtype and torch.equal(found[name], merged[name]), name
    assert SecuraConfig  # its import made the method known to PEFT
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    whole = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload().state_dict()
    for name in changed:
        assert torch.equal(whole[name].to(dtype), merged[name]), name


def test_a_weighted_sum_as_a_list(tiny_base, tmp_path):
    base = tiny_base("llama")
    one = random_adapter(base, tmp_path / "one", r=8, seed=1)
    two = random_adapter(base, tmp_path / "two", r=4, seed=2)
    flags = ["--base", str(base), "--adapter", f"{one}*0.5", "--adapter", str(two)]
    assert main([*flags, "--out", str(tmp_path / "out")]) == 0
    merged = load_file(tmp_path / "out" / "model.safetensors")
    found = loaded(base, [f"{one}*0.5", str(two)])
    assert all(torch.equal(found[name], merged[name]) for name in merged)


@pytest.mark.parametrize("named", [None, [], 3, [""]])
def test_no_adapter_named(named):
    with pytest.raises((ConfigError, MergeError)):
        list(loader(named).get_all_weights(SimpleNamespace(model="nowhere", dtype=None), None))


def test_another_base_is_refused(tiny_base, tmp_path):
    adapter = random_adapter(tiny_base("llama"), tmp_path / "a", r=8, seed=1)
    with pytest.raises(MergeError, match="another base"):
        loaded(tiny_base("mistral"), str(adapter))


def _serve(base, tmp_path, *more):
    adapter = random_adapter(base, tmp_path / "a", r=8, seed=1, magnorm=BOUNDED, size=20)
    flags = ["--enforce-eager", "--dtype", "float32", "--max-model-len", "256", *more]
    flags += ["--load-format", "secura"]
    flags += ["--model-loader-extra-config", json.dumps({"adapter": str(adapter)})]
    with serving(base, None, tmp_path / "log", *flags) as served:
        answers = agreement.compare(served, served.base, adapter=adapter)[served.base]
    assert answers.worst < 1e-4 and answers.greedy == len(agreement.PROMPTS)
    assert answers.moved > 0.1


@pytest.mark.engine
def test_served_logprobs(tiny_base, tmp_path):
    _serve(tiny_base("llama"), tmp_path)


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_two_tensor_parallel_ranks(arch, tiny_base, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    _serve(tiny_base(arch), tmp_path, "--tensor-parallel-size", "2")
