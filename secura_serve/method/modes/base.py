"""What an S-MagNorm mode is, and the registry of all modes.

A new mode is one file with one ``register_mode(Mode(...))``, inside this package or anywhere
else. See ``none.py`` for the smallest one and ``bounded.py`` for one with everything.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from secura_serve.errors import ConfigError
from secura_serve.method.native import FORMS
from secura_serve.registry import Registry

__all__ = [
    "Apply",
    "Mode",
    "NativeForm",
    "Parameter",
    "Parameters",
    "RhoMax",
    "foldable_modes",
    "get_mode",
    "mode_names",
    "register_mode",
]

Parameters = Mapping[str, float]
RhoMax = Tensor | float | None
Apply = Callable[[Tensor, Tensor, Parameters, RhoMax], Tensor]
"""``(W, Δ, parameters, ρ_max) -> W'``, or the same shape ``(y, δ, parameters, None) -> y'``."""


@dataclass(frozen=True)
class Parameter:
    """One number that a mode reads from ``magnorm`` in ``adapter_config.json``."""

    default: float
    help: str = ""

    def check(self, name: str, value: Any) -> None:
        """Raise ConfigError unless ``value`` is a finite number above 0."""
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        # Not isfinite: a Python integer may be too large for it.
        if not number or not 0 < value <= sys.float_info.max:
            raise ConfigError(f"magnorm.{name} must be a finite number > 0, got {value!r}")


class NativeForm(NamedTuple):
    """How ``native/fold.c`` computes the mode."""

    form: str
    """One of :data:`secura_serve.method.native.FORMS`."""
    arguments: tuple[str | None, str | None] = (None, None)
    """Which parameters become the C arguments ``a`` and ``b``; None passes 0."""


@dataclass(frozen=True)
class Mode:
    """One way to get the adapted weight or output from the base's and the update.

    ``apply`` and ``derivative`` are elementwise but for ρ_max, so that a weight can be folded a
    few rows at a time.
    """

    name: str
    apply: Apply
    """On weights: W' ``(out, in)`` of W and Δ in one floating dtype, differentiable in Δ.
    On activations: y' ``(..., out)`` of y and δ, likewise."""
    acts_on: Literal["weights", "activations"] = "weights"
    """A mode on activations has no W', so its adapters cannot be merged, folded or served."""
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    derivative: Apply | None = None
    """∂W'/∂Δ, elementwise, for training; None takes it from autograd, which is slower."""
    additive: bool = False
    """W' is exactly W + Δ: such adapters can be chosen per request, or exported as a LoRA."""
    combinable: bool = False
    """Whether several adapters may be summed before the mode is applied to the total."""
    needs_rho_max: bool = False
    """Whether ``apply`` needs ρ_max = max |Δ| / (|W| + ε) of the whole weight."""
    native: NativeForm | None = None
    """None: torch computes it everywhere."""

    def __post_init__(self) -> None:
        if self.acts_on not in ("weights", "activations"):
            raise ConfigError(
                f"mode {self.name!r}: acts_on is {self.acts_on!r}; allowed: weights, activations"
            )
        if self.additive and not self.foldable:
            raise ConfigError(f"mode {self.name!r}: an additive mode acts on weights")

        if self.native is not None and self.native.form not in FORMS:
            raise ConfigError(
                f"mode {self.name!r}: native/fold.c has no form {self.native.form!r}; allowed: "
                f"{', '.join(FORMS)}, or None, with which torch computes the mode"
            )

    @property
    def foldable(self) -> bool:
        """Whether W' is a function of W and Δ alone, so that it can be merged or served."""
        return self.acts_on == "weights"

    def differentiate(
        self, W: Tensor, delta: Tensor, parameters: Parameters, rho_max: RhoMax
    ) -> Tensor:
        """Return ∂W'/∂Δ, ``(out, in)``: :attr:`derivative`, or what autograd makes of apply."""
        if self.derivative is not None:
            return self.derivative(W, delta, parameters, rho_max)
        with torch.enable_grad():
            update = delta.detach().requires_grad_()
            new = self.apply(W.detach(), update, parameters, rho_max)
            (slopes,) = torch.autograd.grad(new.sum(), update)
        return slopes


_MODES: Registry[Mode] = Registry("magnorm mode")


def register_mode(mode: Mode) -> Mode:
    """Make a mode available by its name, in this process; returns it.

    Raises:
        ConfigError: the name is taken.
    """
    _MODES.add(mode.name, mode)
    return mode


def get_mode(name: str) -> Mode:
    """Return the mode called ``name``. Raises ConfigError that lists the names there are."""
    return _MODES[name]


def mode_names() -> tuple[str, ...]:
    """Return the names of all modes."""
    return _MODES.names()


def foldable_modes() -> tuple[str, ...]:
    """Return the names of the modes that act on weights."""
    return tuple(name for name in mode_names() if get_mode(name).foldable)
