"""Proves the kernels' registry: what is chosen, what is refused, and a kernel from outside.

Needs torch only.
"""

from __future__ import annotations

import pytest
import torch

from secura_serve.errors import ConfigError
from secura_serve.serve.kernels import Kernel, base, choose_kernel, kernel_names, register_kernel
from secura_serve.serve.kernels.torch_kernel import TorchKernel
from tests.support.stepping import Linear

CPU = torch.device("cpu")
BUILT_IN = kernel_names()


@pytest.fixture
def toy(monkeypatch):
    """A kernel that counts its calls, registered for the time of a test."""
    monkeypatch.setattr(base._KERNELS, "_entries", dict(base._KERNELS))
    monkeypatch.delenv("SECURA_KERNEL", raising=False)

    @register_kernel
    class Toy(TorchKernel):
        name, priority, calls = "toy", 30, 0

        @classmethod
        def is_supported(cls, device, dtype):
            return dtype == torch.float32

        def step(self, *args):
            type(self).calls += 1
            return super().step(*args)

    return Toy


def test_a_kernel_from_outside_is_chosen_and_does_the_step(toy):
    kernel = choose_kernel(CPU, torch.float32)
    assert type(kernel) is toy and kernel_names() == [*BUILT_IN, "toy"]
    Linear(kernel, (24, 8), (6, 4), torch.float32, biased=True).check(9)
    assert toy.calls == 1


def test_one_that_is_not_supported_is_not_chosen(toy, monkeypatch):
    assert type(choose_kernel(CPU, torch.bfloat16)) is not toy
    monkeypatch.setenv("SECURA_KERNEL", "toy")
    with pytest.raises(ConfigError, match="toy: not supported.*bfloat16; allowed: .*torch"):
        choose_kernel(CPU, torch.bfloat16)


def test_a_name_that_is_taken_is_refused(toy):
    class Other(TorchKernel):
        name = "toy"

    with pytest.raises(ConfigError, match="kernel 'toy' is registered already"):
        register_kernel(Other)


def test_an_unknown_name_raises_with_the_allowed_ones(monkeypatch):
    monkeypatch.setenv("SECURA_KERNEL", "cuda")
    assert {"native", "triton", "torch"} <= set(BUILT_IN)
    with pytest.raises(ConfigError, match=f"no such kernel; allowed: {', '.join(BUILT_IN)}$"):
        choose_kernel(CPU, torch.float32)


def test_the_named_kernel_is_used(monkeypatch):
    monkeypatch.setenv("SECURA_KERNEL", "torch")
    assert type(choose_kernel(CPU, torch.float32)) is TorchKernel


def test_a_gpu_kernel_is_refused_on_a_cpu(monkeypatch):
    monkeypatch.setenv("SECURA_KERNEL", "triton")
    with pytest.raises(ConfigError, match="not supported on this machine"):
        choose_kernel(CPU, torch.float32)


def test_torch_equals_loops():
    assert issubclass(TorchKernel, Kernel)
    Linear(TorchKernel(), (96, 32, 32), (16, 5, 1), torch.float32, biased=True).check(13)
