"""Proves the GPU's fold against float64, of whole weights and of a rank's part in place, and the
way back to the last bit, on the CPU through Triton's interpreter. Counts the launches, and compiles
them for GPUs that are not here.

Needs the package ``triton``; see ``tests/serve/kernels/test_triton_step.py`` for why in processes
of their own. On a machine with a GPU the same cases run compiled as well.
"""

from __future__ import annotations

import pytest

from tests.support.interpreted import TRITON_RELEASES, compiled, run
from tests.support.triton_cases import FOLD, SHARD

pytest.importorskip("triton", reason="no triton package")


COMPILED = """
import torch
from benchmarks._launches import LLAMA3_8B, caught, fake
from secura_serve.merge.fold import triton_code, triton_fold
from secura_serve.merge.fold import Part, Target
from secura_serve.merge.fold.journal import Journal
from secura_serve.merge.fold.target import Gathered
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

def wide(launch):
    if launch.kernel.__name__ != "fold":
        return ()
    return ("W",) if launch.given["R"] is None else ("W", "R")

found = []
tried = (("bounded", (16,)), ("bounded", (150,)), ("published", (32, 32)), ("none", (64,)))
for mode, ranks in tried:
    for target in TARGETS:
        triton_fold.tallest = lambda device: 32 if target == "sm_100" else 64
        for launch in launches(4096, 14336, ranks, MagNorm(mode)):
            found += faults(launch, target, wide(launch))
for launch in launches(4096, 4096, (64,), MagNorm("bounded"), torch.float32):
    found += faults(launch, "sm_90", wide(launch))
# In place: a rank's rows, columns or part of a parameter, with and without a journal.
def in_place(out, width, ranks, norm, dtype=torch.bfloat16, old=0, new=0):
    parts = tuple(
        Part("a", 1.0, torch.zeros(r, r), Basis(torch.arange(r), torch.arange(r)), "", 1.0)
        for r in ranks
    )
    held, flags = fake(out, width, dtype=dtype), fake(2, dtype=torch.int32)
    gathered = Gathered(tuple(fake(out, r, dtype=dtype) for r in ranks),
                        tuple(fake(r, width, dtype=dtype) for r in ranks))
    journals = [Journal.empty(held, bits) if bits else None for bits in (old, new)]
    with caught(triton_code) as found:
        triton_fold.fold_in_place(held, Target("m", parts), norm, gathered, flags, *journals)
    return found

def undone(out, width, bits):
    held = fake(out, width, dtype=torch.bfloat16)
    with caught(triton_code) as found:
        triton_fold.take_back(held, Journal.empty(held, bits), fake(2, dtype=torch.int32))
    return found

tried = (("bounded", (16,), 0, 4), ("bounded", (150,), 4, 4), ("bounded", (32, 32), 8, 4),
         ("bounded", (64,), 8, 8), ("published", (32,), 4, 0), ("none", (64,), 0, 0))
for target in TARGETS:
    triton_fold.tallest = lambda device: 32 if target == "sm_100" else 64
    for mode, ranks, old, new in tried:
        for launch in in_place(512, 14336, ranks, MagNorm(mode), old=old, new=new):
            found += faults(launch, target, wide(launch))
    for launch in [*undone(512, 14336, 4), *undone(4096, 1792, 8)]:
        found += faults(launch, target, wide(launch))
assert not found, "\\n".join(found)
# A fold of the whole model: 7 linears in each of 32 layers.
linears = [(out, width) for width, outs in LLAMA3_8B.values() for out in outs]
assert len(linears) == 7
assert all(len(launches(*shape, (32,), MagNorm("bounded"))) == 2 for shape in linears)
# In place too, from the base and from one adapter to the next; the way back is one.
for shape in linears:
    for bits in (0, 4, 8):
        assert len(in_place(*shape, (32,), MagNorm("bounded"), old=bits, new=4)) == 2
        assert not bits or len(undone(*shape, bits)) == 1
"""


@pytest.mark.long
@pytest.mark.parametrize("cases", [FOLD, SHARD], ids=["whole", "shards and the way back"])
def test_interpreted_on_the_cpu(cases):
    run(cases.format(device="cpu", dtypes="(torch.float32, torch.float16)"), interpreted=True)


@pytest.mark.parametrize("cases", [FOLD, SHARD], ids=["whole", "shards and the way back"])
def test_compiled_on_a_gpu(cases):
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    dtypes = "(torch.float32, torch.float16, torch.bfloat16)"
    run(cases.format(device="cuda", dtypes=dtypes), interpreted=False)


@pytest.mark.long
@pytest.mark.parametrize("release", TRITON_RELEASES)
def test_two_launches_a_linear_that_compile_for_every_gpu(release):
    compiled(COMPILED.format(release=release), release)
