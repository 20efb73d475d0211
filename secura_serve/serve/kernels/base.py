"""What a kernel for the adapter step must do, and the registry from which one is chosen."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from secura_serve.errors import ConfigError
from secura_serve.registry import Registry
from secura_serve.serve.kernels.activation import gated
from secura_serve.serve.kernels.layout import Layout

__all__ = ["Kernel", "choose_kernel", "kernel_names", "register_kernel"]

State = TypeVar("State")
"""What a kernel prepares once for a linear: a frozen dataclass of its own."""


class Kernel(ABC, Generic[State]):
    """One way to compute y + C·(U_slot·(y − b)[rows])."""

    name: ClassVar[str]
    """What ``SECURA_KERNEL`` and the log call it."""
    priority: ClassVar[int]
    """Of the kernels that are supported, the one with the highest priority is used."""
    skips: ClassVar[bool] = False
    """Whether :meth:`step` reads nothing of a batch without adapters."""
    fuses: ClassVar[frozenset[str]] = frozenset()
    """The activations with which :meth:`activated_step` is better than a step before them."""
    takes_linear: ClassVar[bool] = False
    """Whether :meth:`linear` is better than a step after the linear."""

    @classmethod
    @abstractmethod
    def is_supported(cls, device: torch.device, dtype: torch.dtype) -> bool:
        """Return whether this kernel runs here, on tensors of this device and dtype."""

    def layout(self, n: int, r: int, dtype: torch.dtype) -> Layout:
        """Return how the bank holds the U of a linear with ``n`` slices and a basis of ``r``."""
        return Layout(n, r)

    @abstractmethod
    def prepare(
        self, rows: Tensor, C: Tensor, offset: Tensor | None, starts: Sequence[int]
    ) -> State:
        """Return what :meth:`step` needs besides the bank; all adapters share it.

        Args:
            rows: ``(n, r)`` int64 on the CPU, the columns of ``source`` to gather; −1 for none.
            C: ``(r, out)``, the transposed C of the slices side by side.
            offset: ``(n·r,)``, the bias at ``rows``.
            starts: where each slice's columns begin, and where the last slice ends.
        """

    @abstractmethod
    def step(
        self,
        y: Tensor,
        source: Tensor | None,
        slots: Tensor,
        bank: Tensor,
        ranks: Tensor,
        state: State,
        active: Tensor,
    ) -> Tensor:
        """Return the adapted output, which may be ``y`` itself, changed in place.

        torch.compile traces this call, with ``fullgraph=True``.

        Args:
            y: ``(T, out)``.
            source: the tensor to gather from; None for ``y``.
            slots: ``(T,)`` int64, each token's slot; −1 for none.
            bank: ``(slots + 1, *layout.shape)``.
            ranks: ``(slots + 1,)`` int32.
            state: what :meth:`prepare` returned for this linear.
            active: ``()`` bool on the CPU; False where no token of the batch has an adapter.
        """

    def activated_step(
        self,
        y: Tensor,
        source: Tensor | None,
        slots: Tensor,
        bank: Tensor,
        ranks: Tensor,
        state: State,
        active: Tensor,
        activation: str,
    ) -> Tensor:
        """Return act(gate')·up' of the adapted output of two slices of one width, as new memory.

        Traced like :meth:`step`, whose arguments these are.

        Args:
            y: ``(T, 2·d)``, gate and up side by side.
            activation: one of :attr:`fuses`.

        Returns:
            ``(T, d)``.
        """
        adapted = self.step(y, source, slots, bank, ranks, state, active)
        return gated(adapted, activation)

    def linear(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        R: Tensor | None,
        slots: Tensor,
        bank: Tensor,
        ranks: Tensor,
        state: State,
        active: Tensor,
        activation: str | None = None,
    ) -> Tensor:
        """Return the adapted output of a linear that is not quantised: W·x + b and the step.

        With an activation return what :meth:`activated_step` makes of W·x + b. Traced like
        :meth:`step`, whose arguments the others are.

        Args:
            x: ``(T, in)``.
            weight: ``(out, in)``.
            bias: ``(out,)``.
            R: ``(n·r, in)``, whose rows are meant by ``rows``; None where those of ``weight`` are.
        """
        raise NotImplementedError


_KERNELS: Registry[type[Kernel[Any]]] = Registry("kernel")


def register_kernel(kernel: type[Kernel[Any]]) -> type[Kernel[Any]]:
    """Make a kernel known under its name; usable as a decorator.

    Raises:
        ConfigError: another kernel has this name.
    """
    _KERNELS.add(kernel.name, kernel)
    return kernel


def kernel_names() -> list[str]:
    """Return the names of all registered kernels, in the order of registration."""
    return list(_KERNELS)


def choose_kernel(device: torch.device, dtype: torch.dtype) -> Kernel[Any]:
    """Return the kernel that ``SECURA_KERNEL`` names, or else the fastest that is supported.

    Raises:
        ConfigError: ``SECURA_KERNEL`` names a kernel that does not exist or is not supported here.
    """
    wanted = os.environ.get("SECURA_KERNEL")
    if wanted and wanted not in _KERNELS:
        raise ConfigError(f"SECURA_KERNEL={wanted}: no such kernel; allowed: {', '.join(_KERNELS)}")
    ranked = sorted(_KERNELS.values(), key=lambda kernel: -kernel.priority)
    if not wanted:
        return next(kernel for kernel in ranked if kernel.is_supported(device, dtype))()
    if not _KERNELS[wanted].is_supported(device, dtype):
        usable = [kernel.name for kernel in ranked if kernel.is_supported(device, dtype)]
        raise ConfigError(
            f"SECURA_KERNEL={wanted}: not supported on this machine for {device.type} and {dtype}; "
            f"allowed: {', '.join(usable)}"
        )
    return _KERNELS[wanted]()
