"""The adapter step y + C·(U_slot·(y − b)[rows]), and one kernel for each kind of device.

=========  ==================================  ==============================================
kernel     runs where                          reads
=========  ==================================  ==============================================
native     CPU, with a C++ compiler            U and C with pairs of the contracted index side
                                               by side, for the dot product of bfloat16
triton     GPU with Triton                     U as ``(r, r)``, C as ``(r, out)``
torch      everywhere                          the same, C block-diagonal
=========  ==================================  ==============================================

``triton-after`` is ``triton`` with nothing of the step beside the linear.

Beside it stands :func:`delta_step`, for adapters whose update is a whole matrix.

A new kernel is a file with a subclass of :class:`Kernel` and one line below. A package of your own
calls :func:`register_kernel` from its ``vllm.general_plugins`` entry point.
"""

from __future__ import annotations

from secura_serve.serve.kernels.activation import ACTIVATIONS, use_base_activation
from secura_serve.serve.kernels.base import Kernel, choose_kernel, kernel_names, register_kernel
from secura_serve.serve.kernels.delta_slots import PADDED, DeltaSlots, delta_blocks
from secura_serve.serve.kernels.delta_step import choose_delta_step, delta_step
from secura_serve.serve.kernels.layout import Layout
from secura_serve.serve.kernels.native_kernel import NativeKernel
from secura_serve.serve.kernels.torch_kernel import TorchKernel
from secura_serve.serve.kernels.triton_kernel import TritonAfterKernel, TritonKernel

__all__ = [
    "ACTIVATIONS",
    "PADDED",
    "DeltaSlots",
    "Kernel",
    "Layout",
    "choose_delta_step",
    "choose_kernel",
    "delta_blocks",
    "delta_step",
    "kernel_names",
    "register_kernel",
    "use_base_activation",
]

register_kernel(NativeKernel)
register_kernel(TritonKernel)
register_kernel(TritonAfterKernel)
register_kernel(TorchKernel)
