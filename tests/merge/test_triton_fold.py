"""Proves the GPU's fold against float64, on the CPU through Triton's interpreter, counts its
launches, and compiles them for GPUs that are not here.

Needs the package ``triton``; see ``tests/serve/kernels/test_triton_step.py`` for why in processes
of their own. On a machine with a GPU the same cases run compiled as well.
"""

from __future__ import annotations

import pytest

from tests.serve.kernels.test_triton_aot import compiled
from tests.support.interpreted import run

pytest.importorskip("triton", reason="no triton package")

CASES = """
import itertools, torch
from secura_serve.merge import triton_fold
from secura_serve.merge.fold import Part, Target
from secura_serve.method import Basis, MagNorm, apply

device, gen = torch.device({device!r}), torch.Generator().manual_seed(0)
TOLERANCE = {{torch.float32: 1e-6, torch.float16: 6e-4, torch.bfloat16: 5e-3}}
NORMS = [MagNorm("none"), MagNorm("bounded", tau=0.05), MagNorm("published")]
SHAPES = [((48, 80), (5,)), ((130, 67), (16, 3)), ((64, 128), (40,))]

def case(shape, ranks, dtype, norm, transposed):
    W = torch.randn(shape, generator=gen).to(dtype)
    W[3, 5:9] = 0
    parts = []
    for i, r in enumerate(ranks):
        basis = Basis(torch.randperm(shape[0], generator=gen)[:r],
                      torch.randperm(shape[1], generator=gen)[:r])
        U = torch.randn(r, r, generator=gen) * 0.02
        parts.append(Part("a", 1 - 0.25 * i, U, basis, "", None))
    D = sum(p.weight * W.double()[:, p.basis.cols] @ p.U.double() @ W.double()[p.basis.rows]
            for p in parts)
    peak = float((D.abs() / (W.double().abs() + 1e-8)).max()) if norm.needs_rho_max else None
    parts = [Part(p.adapter, p.weight, p.U, p.basis, "", peak) for p in parts]
    want = apply(W.double(), D, norm, peak=peak)
    held = (W.T.contiguous() if transposed else W).to(device)
    target = Target("m", tuple(parts), transposed)
    bad = torch.zeros(1, dtype=torch.int32, device=device)
    assert triton_fold.supports(held, target, norm)
    got = triton_fold.fold_on_gpu(held, target, norm, dtype, bad)
    got = (got.T if transposed else got).cpu().double()
    worst = float((got - want).abs().max() / want.abs().max())
    assert worst < TOLERANCE[dtype], (shape, ranks, dtype, norm, worst)
    assert not bool(bad.any())

for (shape, ranks), dtype, norm in itertools.product(SHAPES, {dtypes}, NORMS):
    case(shape, ranks, dtype, norm, False)
case((48, 80), (5,), torch.float32, NORMS[1], True)
# The parts of a float32, one after the other, as for bfloat16.
triton_fold._SPLIT = (torch.bfloat16, torch.float16)
case((48, 80), (16,), torch.float16, NORMS[0], False)
case((70, 140), (40,), torch.float16, NORMS[1], False)
W = torch.ones(16, 32, dtype=torch.float16, device=device)
bad = torch.zeros(1, dtype=torch.int32, device=device)
one = Part("a", 1.0, torch.full((1, 1), 1e6), Basis(torch.tensor([0]), torch.tensor([1])), "")
triton_fold.fold_on_gpu(W, Target("m", (one,)), NORMS[0], torch.float16, bad)
assert bool(bad.all())

# The stream that every consumer reads: the same weights as torch's own fold, and errors at its end.
from secura_serve.errors import MergeError
from secura_serve.merge import FoldPlan, fold_stream, stream

W = torch.randn(64, 96, generator=gen).to(device)
basis = Basis(torch.arange(8), torch.arange(8))
for U, fine in ((torch.randn(8, 8, generator=gen) * 0.02, True), (torch.full((8, 8), 3e38), False)):
    target = Target("m", (Part("a", 1.0, U, basis, ""),))
    plan = FoldPlan({{"m.weight": target}}, NORMS[0], None, True)
    folds = []
    for quick in (False, True):
        stream.takes_triton = lambda *args: quick
        try:
            folds.append(dict(fold_stream([("m.weight", W), ("n", W)], plan)))
        except MergeError as error:
            assert not fine and "m: NaN or Inf" in str(error.problems)
    assert len(folds) == 2 * fine
    for name in ("m.weight", "n") if fine else ():
        torch.testing.assert_close(folds[0][name], folds[1][name])
"""

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
    run(CASES.format(device="cpu", dtypes="(torch.float32, torch.float16)"), interpreted=True)


def test_compiled_on_a_gpu():
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    dtypes = "(torch.float32, torch.float16, torch.bfloat16)"
    run(CASES.format(device="cuda", dtypes=dtypes), interpreted=False)


@pytest.mark.long
@pytest.mark.parametrize("release", ["", "3.6.0", "3.7.1", "3.8.0"])
def test_two_launches_a_linear_that_compile_for_every_gpu(release, tmp_path):
    compiled(COMPILED.format(release=release), release, tmp_path)
