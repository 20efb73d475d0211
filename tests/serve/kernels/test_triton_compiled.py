"""Proves that a compiled model hands the GPU step the base linear's own output: no copy of y.

Needs the package ``triton`` and a C++ compiler; no GPU, since a batch without adapters launches
nothing.
"""

from __future__ import annotations

import re

import pytest
import torch

pytest.importorskip("triton", reason="no triton package")

from secura_serve.serve.kernels.triton_kernel import TritonKernel  # noqa: E402
from tests.support.stepping import Linear  # noqa: E402


@pytest.mark.long
@pytest.mark.parametrize("activation", [None, "silu"])
def test_inductor_does_not_copy_y(activation):
    from torch._inductor.utils import run_and_get_code

    outs = (96, 32, 32) if activation is None else (64, 64)
    linear = Linear(TritonKernel(), outs, (16, 5), torch.bfloat16, biased=False)
    W, active = linear.noise(linear.out, 24), torch.tensor(False)
    held = (linear.part, linear.ranks, linear.state, active)

    def layer(x, slots):
        y = torch.nn.functional.linear(x, W)
        flat = y.reshape(-1, y.shape[-1])
        if activation is not None:
            batch = (flat, None, slots[: flat.shape[0]])
            return torch.relu(linear.kernel.activated_step(*batch, *held, activation))
        made = linear.kernel.step(flat, None, slots[: flat.shape[0]], *held)
        return torch.relu(made.view(y.shape))

    def whole(x, slots):
        batch = (x, W, None, None, slots[: x.shape[0]])
        return torch.relu(linear.kernel.linear(*batch, *held, activation))

    slots = torch.zeros(64, dtype=torch.int64)
    x = linear.noise(9, 24)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    out, (code, *_) = run_and_get_code(compiled, x, slots)
    torch.testing.assert_close(out, layer(x, slots))
    made = re.search(r"extern_kernels\.\w*mm\(.*out=(buf\d+)\)", code)
    given = re.search(
        r"secura_gpu\.(?:step_|activated)\.default\((?:reinterpret_tensor\()?(buf\d+)", code
    )
    assert made and given and made[1] == given[1], code
    # Where the linear is in the op, nothing is left around it to be copied.
    compiled = torch.compile(whole, fullgraph=True, dynamic=True)
    assert torch.equal(compiled(x, slots), out)


def test_a_batch_without_adapters_needs_no_gpu_at_all():
    linear = Linear(TritonKernel(), (24,), (8,), torch.bfloat16, biased=True)
    y = linear.noise(5, 24)
    slots = torch.zeros(5, dtype=torch.int64)
    assert torch.equal(linear.step(y.clone(), slots, active=False), y)
