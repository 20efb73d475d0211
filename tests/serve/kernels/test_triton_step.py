"""Proves the Triton kernels against float64 loops, on the CPU through Triton's interpreter.

Needs the package ``triton``; the interpreter must be chosen before it is imported, hence the
processes. On a machine with a GPU the same cases run compiled as well.
"""

from __future__ import annotations

import pytest

from tests.support.interpreted import run
from tests.support.triton_cases import STEP

pytest.importorskip("triton", reason="no triton package")


@pytest.mark.long
def test_interpreted_on_the_cpu():
    # The interpreter computes with NumPy, which has no bfloat16.
    run(STEP.format(device="cpu", dtypes="(torch.float32, torch.float16)"), interpreted=True)


def test_compiled_on_a_gpu():
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    dtypes = "(torch.float32, torch.float16, torch.bfloat16)"
    run(STEP.format(device="cuda", dtypes=dtypes), interpreted=False)
