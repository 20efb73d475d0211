"""Proves the Triton kernels against float64 loops, on the CPU through Triton's interpreter.

Needs the package ``triton``; the interpreter must be chosen before it is imported, hence the
processes. On a machine with a GPU the same cases run compiled as well.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.support import ROOT

pytest.importorskip("triton", reason="no triton package")

CASES = """
import itertools, torch
from dataclasses import replace
from secura_serve.serve.kernels import triton_step
from secura_serve.serve.kernels.triton_kernel import TritonKernel
from tests.support.stepping import Linear

device = torch.device({device!r})
# Slices that end at odd columns, ranks that are no multiples of 8, and tiles of ranks.
shapes = [((40,), (3,)), ((96, 32, 32), (16, 5, 1)), ((201, 131), (33, 8)), ((304,), (200, 72))]
for (outs, ranks), dtype, biased in itertools.product(shapes, {dtypes}, (False, True)):
    linear = Linear(TritonKernel(), outs, ranks, dtype, biased, device=device)
    for tokens in (1, 5, 67):
        linear.check(tokens)
    # As for long prompts: tokens grouped by adapter, with many in a tile and with one.
    triton_step._DECODE, triton_step._GROUPED_RANK = 0, 0
    linear.check(37)
    linear.check(70, slots=torch.arange(70) // 40 - 1)
    triton_step._DECODE, triton_step._GROUPED_RANK = 512, 64
# Entries that were made elsewhere, and an empty batch.
linear = Linear(TritonKernel(), (24, 8), (6, 4), torch.float32, False, device=device)
y, slots = linear.noise(9, 32).to(device), torch.randint(-1, 2, (9,)).to(device)
plain = linear.step(y.clone(), slots)
rows = linear.state.rows
source = y[:, rows.flatten().clamp(min=0).long()].contiguous()
straight = torch.arange(rows.numel(), dtype=torch.int32, device=device).view(rows.shape)
linear.state = replace(linear.state, rows=straight)
torch.testing.assert_close(linear.step(y.clone(), slots, source), plain)
linear.step(y[:0], slots[:0])
# A batch without adapters is left alone, whatever the buffer of slots holds.
assert torch.equal(linear.step(y.clone(), slots, source, active=False), y)
"""


def _run(device, dtypes, **env):
    subprocess.run(
        [sys.executable, "-c", CASES.format(device=device, dtypes=dtypes)],
        check=True,
        cwd=ROOT,
        env=os.environ | env,
    )


@pytest.mark.long
def test_interpreted_on_the_cpu():
    # The interpreter computes with NumPy, which has no bfloat16.
    _run("cpu", "(torch.float32, torch.float16)", TRITON_INTERPRET="1")


def test_compiled_on_a_gpu():
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    _run("cuda", "(torch.float32, torch.float16, torch.bfloat16)")
