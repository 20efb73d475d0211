"""Proves the native adapter step against float64 loops over dtypes, ranks, slices and batches.

Needs a C++ compiler; skipped with the reason where the op cannot be made.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from secura_serve.serve.kernels import native_step
from secura_serve.serve.kernels.native_kernel import NativeKernel
from tests.support.stepping import TOLERANCE, Linear

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(
    not native_step.is_supported(CPU, torch.float32), reason="no C++ compiler, or torch before 2.10"
)


@pytest.mark.long
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(
    ("outs", "ranks"),
    [((40,), (3,)), ((96, 32, 32), (16, 5, 1)), ((300, 300), (33, 8)), ((65,), (32, 16, 2, 7))],
)
def test_equals_loops(outs, ranks, dtype, biased):
    linear = Linear(NativeKernel(), outs, ranks, dtype, biased)
    for tokens in (1, 3, 8, 13, 70, 300):
        linear.check(tokens)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_rows_of_a_wider_matrix_and_other_tokens_that_are_not_finite(dtype):
    linear = Linear(NativeKernel(), (48, 16), (8, 4), dtype, biased=True)
    slots = torch.tensor([0, 1, -1, 0, 1, 0, 0, 1, 1])
    sheet = linear.noise(9, linear.out + 24)
    sheet[3] = float("nan")
    y = sheet[:, 8 : 8 + linear.out]
    before, want = sheet.clone(), linear.wanted(y, slots)
    linear.step(y, slots)
    fine = torch.arange(9) != 3
    worst = float((y[fine].double() - want[fine]).abs().max() / want[fine].abs().max())
    assert worst < TOLERANCE[dtype]
    assert torch.equal(sheet[fine, :8], before[fine, :8])
    assert torch.equal(sheet[fine, -16:], before[fine, -16:])


@pytest.mark.long
def test_compiled_with_the_linear_before_it():
    linear = Linear(NativeKernel(), (96, 32, 32), (16, 5), torch.bfloat16, biased=False)
    W = linear.noise(linear.out, 24) * 0.2

    def layer(x, slots):
        y = x @ W.T
        linear.step(y.reshape(-1, y.shape[-1]), slots[: y.shape[0]])
        return torch.relu(y)

    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    slots = torch.randint(-1, 2, (64,), generator=linear.gen)
    for tokens in (5, 16, 31):
        x = linear.noise(tokens, 24)
        torch.testing.assert_close(compiled(x, slots), layer(x, slots), rtol=1e-2, atol=1e-2)


def test_other_dtypes_are_refused():
    with pytest.raises(RuntimeError, match="bfloat16, float16 or float32"):
        linear = Linear(NativeKernel(), (8,), (2,), torch.float32, biased=False)
        linear.step(torch.zeros(1, 8, dtype=torch.float64), torch.zeros(1, dtype=torch.int64))


@pytest.mark.long
@pytest.mark.parametrize("setting", [{"SECURA_NATIVE": "0"}, {"CXX": "/no/such/compiler"}])
def test_without_a_compiler_the_expression_is_left(setting, tmp_path):
    code = (
        "import torch; from secura_serve.serve.kernels import native_step;"
        "assert not native_step.is_supported(torch.device('cpu'), torch.float32)"
    )
    env = {"PATH": "/usr/bin:/bin", "SECURA_CACHE": str(tmp_path)} | setting
    subprocess.run([sys.executable, "-c", code], check=True, env=env)
