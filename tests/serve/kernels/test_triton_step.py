"""Proves the Triton kernels against float64 loops, on the CPU through Triton's interpreter.

Needs the package ``triton``; the interpreter must be chosen before it is imported, hence the
processes. On a machine with a GPU the same cases run compiled as well.
"""

from __future__ import annotations

import pytest

from tests.support.interpreted import run
from tests.support.triton_cases import ACTIVATED, LINEAR, STEP, STREAMS

pytest.importorskip("triton", reason="no triton package")


CASES = pytest.mark.parametrize(
    "code", [STEP, ACTIVATED, LINEAR, STREAMS], ids=["step", "activated", "linear", "streams"]
)


# The interpreter computes with NumPy, which has no bfloat16. Which dtype comes first decides which
# half of the steps' cases is interpreted.
@pytest.mark.long
@CASES
@pytest.mark.parametrize(
    "dtypes",
    [
        "(torch.float32, torch.float16)",
        pytest.param("(torch.float16, torch.float32)", marks=pytest.mark.slow),
    ],
)
def test_interpreted_on_the_cpu(code, dtypes):
    run(code.format(device="cpu", dtypes=dtypes), interpreted=True)


@CASES
def test_compiled_on_a_gpu(code):
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    dtypes = "(torch.float32, torch.float16, torch.bfloat16)"
    run(code.format(device="cuda", dtypes=dtypes), interpreted=False)
