"""Proves the Triton kernel of resident updates against float64 loops in Triton's interpreter, and
that it compiles for GPUs that are not here without spilled registers.

Needs the package ``triton``; the interpreter must be chosen before it is imported, hence the
processes. On a machine with a GPU the same cases run compiled as well.
"""

from __future__ import annotations

import pytest
import torch

from tests.support.interpreted import compiled, run

pytest.importorskip("triton", reason="no triton package")

CASES = """
import itertools, torch
from secura_serve.serve.kernels import triton_delta
from tests.serve.kernels.test_delta_step import PLACES, assert_near, case, loops

device = torch.device({device!r})
shapes = [((40,), 32), ((40, -16, 17), 72), ((9, 130), 33), ((-5, 3), 1)]
weights = (torch.int8, torch.float32)
for (outs, inner), dtype, weight in itertools.product(shapes, {dtypes}, weights):
    if weight == torch.float32 and dtype != torch.float32:
        continue
    for tokens in (1, 5, 70):
        held, y, x, slots = case(outs, inner, dtype, weight, tokens)
        want = loops(held, y, x, slots)
        given = [t.to(device) for t in (y, x, slots, PLACES, held.weight, held.scale, held.blocks)]
        args = (*given[1:], held.used.to(device), torch.tensor(True))
        triton_delta.launch_delta(given[0], *args)
        assert_near(given[0].cpu(), want)
        before = given[0].clone()
        triton_delta.launch_delta(given[0], *args[:-1], torch.tensor(False))
        triton_delta.launch_delta(given[0], args[0], torch.full_like(args[1], -1), *args[2:])
        assert torch.equal(given[0], before)
"""


@pytest.mark.long
def test_equals_loops_in_the_interpreter():
    run(CASES.format(device="cpu", dtypes="(torch.float32, torch.float16)"), interpreted=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_equals_loops_compiled():
    dtypes = "(torch.float32, torch.float16, torch.bfloat16)"
    run(CASES.format(device="cuda", dtypes=dtypes), interpreted=False)


AOT = """
import torch
from secura_serve.serve.kernels import delta_blocks, triton_delta
from tests.support.triton_aot import TARGETS, caught, fake, faults

found = []
for tokens, (dtype, weight) in [
    (t, kinds) for t in (1, 64, 1024)
    for kinds in ((torch.bfloat16, torch.int8), (torch.float32, torch.float32))
]:
    segments = [(0, 0, 4096), (5120, 4096, 1024)]
    with caught(triton_delta) as launches:
        triton_delta.launch_delta(
            fake(tokens, 6144, dtype=dtype), fake(tokens, 4096, dtype=dtype),
            fake(tokens, dtype=torch.int64), fake(9, dtype=torch.int32),
            fake(4, 5120, 4096, dtype=weight), fake(4, 5120, dtype=torch.float32),
            delta_blocks(segments, torch.device("cpu")), fake(4, 2, dtype=torch.uint8),
            torch.tensor(True),
        )
    assert len(launches) == 1
    for target in TARGETS:
        found += faults(launches[0], target, ("weight",))
assert not found, "\\n".join(found)
"""


@pytest.mark.long
def test_compiles_for_every_gpu():
    compiled(AOT)
