"""Proves the GPU's fold against float64, on the CPU through Triton's interpreter, counts its
launches, and compiles them for GPUs that are not here.

Needs the package ``triton``; see ``tests/serve/kernels/test_triton_step.py`` for why in processes
of their own. On a machine with a GPU the same cases run compiled as well.
"""

from __future__ import annotations

import pytest

from tests.serve.kernels.test_triton_aot import TRITON_RELEASES, compiled
from tests.support.interpreted import run
from tests.support.triton_cases import FOLD

pytest.importorskip("triton", reason="no triton package")


COMPILED = """
import torch
from benchmarks._launches import LLAMA3_8B, caught, fake
from secura_serve.merge import triton_code, triton_fold
from secura_serve.merge.fold import Part, Target
from secura_serve.method import Basis, MagNorm
from tests.support.triton_aot import TARGETS, faults
import triton

assert triton.__version__.startswith({release!r}), triton.__version__
def launches(out, width, ranks, norm, dtype=torch.bfloat16):
    parts = tuple(
        Part("a", 1.0, torch.zeros(r, r), Basis(torch.arange(r), torch.arange(r)), "", 1.0)
        for r in ranks
    )
    with caught(triton_code) as found:
        triton_fold.fold_on_gpu(fake(out, width, dtype=dtype), Target("m", parts), norm, dtype,
                                fake(1, dtype=torch.int32))
    return found

found = []
tried = (("bounded", (16,)), ("bounded", (150,)), ("published", (32, 32)), ("none", (64,)))
for mode, ranks in tried:
    for target in TARGETS:
        triton_fold.tallest = lambda device: 32 if target == "sm_100" else 64
        for launch in launches(4096, 14336, ranks, MagNorm(mode)):
            found += faults(launch, target, ("W",) if launch.kernel.__name__ == "fold" else ())
for launch in launches(4096, 4096, (64,), MagNorm("bounded"), torch.float32):
    found += faults(launch, "sm_90", ("W",) if launch.kernel.__name__ == "fold" else ())
assert not found, "\\n".join(found)
# A fold of the whole model: 7 linears in each of 32 layers.
linears = [(out, width) for width, outs in LLAMA3_8B.values() for out in outs]
assert len(linears) == 7
assert all(len(launches(*shape, (32,), MagNorm("bounded"))) == 2 for shape in linears)
"""


@pytest.mark.long
def test_interpreted_on_the_cpu():
    run(FOLD.format(device="cpu", dtypes="(torch.float32, torch.float16)"), interpreted=True)


def test_compiled_on_a_gpu():
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    dtypes = "(torch.float32, torch.float16, torch.bfloat16)"
    run(FOLD.format(device="cuda", dtypes=dtypes), interpreted=False)


@pytest.mark.long
@pytest.mark.parametrize("release", TRITON_RELEASES)
def test_two_launches_a_linear_that_compile_for_every_gpu(release, tmp_path):
    compiled(COMPILED.format(release=release), release, tmp_path)
