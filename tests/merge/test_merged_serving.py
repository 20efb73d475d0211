"""Proves that what secura-merge writes is served by vLLM as it is: merged checkpoints, GPT-2 and
S-MagNorm included, and LoRA exports, those by a vLLM that knows nothing of us.

Needs vLLM on a CPU; one server per case (slow). The oracle is transformers on the merged folder,
and for S-MagNorm `none` also transformers on weights folded in float64.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from secura_serve import adapter as A
from secura_serve.merge.main import main
from secura_serve.method import MagNorm
from tests.support import agreement, oracle
from tests.support.engines import random_adapter, serving, stock_vllm

FLAGS = ("--enforce-eager", "--dtype", "float32", "--max-model-len", "256")


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.parametrize(("arch", "mode"), [("gpt2", "none"), ("llama", "bounded")])
def test_served_merge_agrees_with_transformers(arch, mode, tiny_base, tmp_path):
    base = tiny_base(arch)
    plain = random_adapter(base, tmp_path / "plain", r=8, seed=1)
    found = A.load(plain)
    config = dataclasses.replace(found.config, magnorm=MagNorm(mode, tau=0.2))
    adapter = A.save(tmp_path / mode, config, found.modules)
    out = tmp_path / "merged"
    assert main(["--base", str(base), "--adapter", str(adapter), "--out", str(out)]) == 0
    nothing = tmp_path / "no-adapters"
    nothing.mkdir()
    with serving(out, nothing, tmp_path / "log", *FLAGS) as served:
        result = agreement.compare(served)[served.base]
    assert result.worst < 1e-4 and result.greedy == len(agreement.PROMPTS)
    ids = list(range(3, 40))
    merged, before = oracle.adapted(out, None), oracle.adapted(base, None)
    moved = oracle.logprobs(merged, ids, [7]) - oracle.logprobs(before, ids, [7])
    assert moved.abs().max() > 0.1
    if mode == "none":
        folded = oracle.logprobs(oracle.adapted(base, plain), ids, [7])
        torch.testing.assert_close(oracle.logprobs(merged, ids, [7]), folded, atol=1e-4, rtol=0)


@pytest.mark.engine
@pytest.mark.slow
def test_stock_vllm_serves_the_lora_export(tiny_base, tmp_path):
    base, adapters, lora = tiny_base("llama"), tmp_path / "adapters", tmp_path / "lora"
    adapter = random_adapter(base, adapters / "random", r=8, seed=1)
    flags = ("--base", str(base), "--adapter", str(adapter), "--out", str(lora), "--to-lora")
    assert main(flags) == 0
    more = (*FLAGS, "--max-lora-rank", "8")
    with stock_vllm(base, {"random": lora}, adapters, tmp_path / "log", *more) as served:
        assert served.adapters == ["random"]
        # Not the base beside it: vLLM 0.32's own LoRA kernels for CPUs get its tokens wrong there.
        result = agreement.compare(served, "random")["random"]
    assert result.worst < 1e-4 and result.greedy == len(agreement.PROMPTS), result
    assert result.moved > 0.1
