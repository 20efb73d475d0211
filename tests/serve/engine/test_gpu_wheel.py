"""Proves that the names and attributes that we use are in the GPU wheel of the newest vLLM.

Needs a package index with that wheel (some 340 MB, unpacked without its libraries, beside the CPU
build of torch): no GPU is asked for, and no engine starts.
"""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile

import pytest

from tests.support import ROOT

VERSION = "0.33.0"
LOOK = """
import inspect, re
from secura_serve.serve import compat
from secura_serve.serve.compat.names import BASE_LINEAR, LAYER, LINEARS, MANAGER, QKV
import vllm
from vllm.lora import layers
from vllm.lora.model_manager import LRUCacheLoRAModelManager
from vllm.lora.ops.triton_ops.lora_kernel_metadata import LoRAKernelMeta
from vllm.lora.punica_wrapper.punica_gpu import PunicaWrapperGPU
from vllm.model_executor.layers import linear
from vllm.v1.worker.gpu_worker import Worker

assert vllm.__version__ == {version!r}, vllm.__version__
compat.check()

def lacks(cls, names):
    sources = "".join(inspect.getsource(c) for c in cls.__mro__ if c.__module__.startswith("vllm"))
    made = set(re.findall(r"self\\.(\\w+)\\s*(?::[^=\\n]+)?=[^=]", sources))
    made |= set(re.findall(r"self\\.(\\w+),", sources))
    return [n for n in names if not (hasattr(cls, n) or n in made or f" {{n}}:" in sources)]

PUNICA = ("_token_lora_indices", "indices_len", "token_mapping_meta")
# output_slices is made by our own mixin where vLLM does not.
wanted = [(getattr(layers, name), [n for n in LAYER if n != "output_slices"]) for name in LINEARS]
wanted += [(LRUCacheLoRAModelManager, MANAGER), (PunicaWrapperGPU, PUNICA)]
wanted += [(LoRAKernelMeta, ("no_lora_flag_cpu",))]
wanted += [(linear.QKVParallelLinear, BASE_LINEAR + QKV), (linear.RowParallelLinear, BASE_LINEAR)]
wanted += [(linear.UnquantizedLinearMethod, ("_gemm_impl",))]
wanted += [(Worker, ("model_runner", "reload_weights"))]
faults = [f"{{cls.__name__}}: {{gone}}" for cls, names in wanted if (gone := lacks(cls, names))]
assert not faults, faults
assert lacks(Worker, ["no_such_name"]) == ["no_such_name"]

# The step of gate and up goes into the activation of these.
from torch import nn
from secura_serve.serve.compat.gated import gated_activation
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.models import llama, mistral, qwen2
for cls in (llama.LlamaMLP, mistral.MistralMLP, qwen2.Qwen2MLP):
    mlp, act = cls.__new__(cls), SiluAndMul.__new__(SiluAndMul)
    for module in (mlp, act):
        nn.Module.__init__(module)
    mlp.gate_up_proj, mlp.act_fn, mlp.down_proj = nn.Identity(), act, nn.Identity()
    assert gated_activation(mlp) == "silu", cls
"""


@pytest.mark.slow
def test_every_name_is_in_the_gpu_wheel(tmp_path):
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps"]
    got = subprocess.run(
        [*pip, "-q", "-d", str(tmp_path), f"vllm=={VERSION}"], capture_output=True, text=True
    )
    if got.returncode:
        pytest.skip(f"the wheel cannot be had: {got.stderr.strip().splitlines()[-1]}")
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = [
            n for n in archive.namelist() if n.endswith((".py", ".json")) or ".dist-info/" in n
        ]
        archive.extractall(tmp_path / "vllm", names)
    wheel.unlink()
    env = os.environ | {"PYTHONPATH": f"{tmp_path / 'vllm'}{os.pathsep}{ROOT}"}
    code = LOOK.format(version=VERSION)
    ran = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]
