"""Proves a fold in place in a real engine: each rank ends up with its part of the weights that were
folded whole in float64, and with the base's bits when it is taken back.

Needs vLLM on a CPU; an engine of two ranks whose weights are left as a GPU's are.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from secura_serve.method import MagNorm
from tests.support import ROOT, oracle
from tests.support.engines import random_adapter

ENGINE = """
import json, sys
from vllm import LLM

def main():
    base, out, lora, *specs = sys.argv[1:]
    llm = LLM(model=base, tensor_parallel_size=2, enforce_eager=True, max_model_len=64,
              dtype="float32", enable_lora=lora == "lora",
              worker_extension_cls="tests.support.in_place.Extension")
    llm.collective_rpc("secura_save", args=(out, 0))
    done = []
    # What the caller has to do after a fold that failed, on whichever ranks.
    failed = []
    for ranks in ([0], [1], [0, 1]):
        told = llm.collective_rpc("secura_break", args=(ranks,))
        assert told == [f"{rank} of {ranks}" for rank in (0, 1)], told
        try:
            llm.collective_rpc("secura_fold", args=(specs[0],))
        except Exception as error:
            failed.append(str(error))
        llm.collective_rpc("secura_fold", args=(None,))
    llm.collective_rpc("secura_save", args=(out, "failed"))
    print("FAILED", json.dumps(failed))
    for step, spec in enumerate(specs, 1):
        done.append(llm.collective_rpc("secura_fold", args=(spec or None,)))
        llm.collective_rpc("secura_save", args=(out, step))
    print("DONE", json.dumps(done))
    llm.llm_engine.engine_core.shutdown()

if __name__ == "__main__":
    main()
"""


def expected(base, adapter, rank):
    """What a rank of two should hold, from the weights of the whole model."""
    model = oracle.adapted(base, adapter)
    held = {}
    for i, layer in enumerate(model.model.layers):
        a, m, at = layer.self_attn, layer.mlp, f"model.layers.{i}"
        for name, parts, axis in (
            (f"{at}.self_attn.qkv_proj", (a.q_proj, a.k_proj, a.v_proj), 0),
            (f"{at}.self_attn.o_proj", (a.o_proj,), 1),
            (f"{at}.mlp.gate_up_proj", (m.gate_proj, m.up_proj), 0),
            (f"{at}.mlp.down_proj", (m.down_proj,), 1),
        ):
            mine = [part.weight.detach().chunk(2, axis)[rank] for part in parts]
            held[f"{name}.weight"] = torch.cat(mine)
    return held


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.parametrize("lora", ["", "lora"], ids=["alone", "beside adapters"])
def test_two_ranks_fold_their_parts_and_take_them_back(lora, tiny_base, tmp_path):
    base = tiny_base("llama")
    bounded = random_adapter(
        base, tmp_path / "b", r=8, seed=1, magnorm=MagNorm("bounded", tau=0.2), size=20
    )
    some = random_adapter(base, tmp_path / "n", r=16, seed=2, only=("q_proj", "o_proj"))
    scaled = random_adapter(base, tmp_path / "p", r=8, seed=3, magnorm=MagNorm("published"))
    steps = [None, bounded, some, scaled, None]
    script = tmp_path / "engine.py"
    script.write_text(ENGINE)
    env = os.environ | {"PYTHONPATH": str(ROOT), "VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    specs = [str(step or "") for step in steps[1:]]
    ran = subprocess.run(
        [sys.executable, str(script), str(base), str(tmp_path), lora, *specs],
        env=env, capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-3000:]
    line = next(line for line in ran.stdout.splitlines() if line.startswith("DONE "))
    for ranks in json.loads(line.removeprefix("DONE ")):
        assert all(rank["in_place"] == rank["modules"] > 0 for rank in ranks), ranks
    line = next(line for line in ran.stdout.splitlines() if line.startswith("FAILED "))
    first, second, both = json.loads(line.removeprefix("FAILED "))
    assert "rank 0 has no memory" in first and "rank 1 has no memory" in second, line
    assert "has no memory" in both, line
    for step, adapter in [*enumerate(steps), ("failed", None)]:
        for rank in (0, 1):
            held = torch.load(tmp_path / f"{step}-{rank}.pt")
            want = expected(base, adapter, rank)
            assert held.keys() == want.keys()
            for name, W in want.items():
                if adapter is None:
                    assert torch.equal(held[name], W), (step, rank, name)
                else:
                    torch.testing.assert_close(held[name], W, atol=2e-6, rtol=2e-6)
