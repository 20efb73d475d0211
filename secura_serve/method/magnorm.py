"""S-MagNorm: how the total update Δ of a weight W becomes the adapted weight W'.

A :class:`MagNorm` names a mode and its parameters; the formulas are in
:mod:`secura_serve.method.modes`. What is here works for every mode.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from secura_serve.errors import ConfigError
from secura_serve.method import native
from secura_serve.method.fold_stats import FoldStats, measure_change
from secura_serve.method.modes import Mode, foldable_modes, get_mode
from secura_serve.method.modes.base import RhoMax
from secura_serve.method.modes.divisor import PARAMETERS, change_ratio
from secura_serve.method.native import Update
from secura_serve.method.product import blocks, product

__all__ = [
    "MagNorm",
    "apply",
    "apply_to_activations",
    "derivative",
    "rho_max",
    "write",
]

# Format 1 allows these in every mode; a mode that does not read one ignores it.
_ALWAYS_ALLOWED = {"tau": get_mode("bounded").parameters["tau"], **PARAMETERS}


@dataclass(frozen=True, init=False, repr=False)
class MagNorm:
    """One S-MagNorm setting, as it stands under ``magnorm`` in ``adapter_config.json``.

    ``MagNorm("bounded", tau=0.05)``; a parameter of the mode can be read as an attribute.
    """

    mode: str
    parameters: tuple[tuple[str, float], ...]
    """Name and value of what the mode reads, defaults filled in."""

    def __init__(self, mode: str = "none", **parameters: float) -> None:
        """Check the mode and its parameters.

        Raises:
            ConfigError: a mode that is not registered, or a parameter that it does not have or
                that is out of range.
        """
        entry = get_mode(mode)
        for name, value in parameters.items():
            allowed = _ALWAYS_ALLOWED | dict(entry.parameters)
            if name not in allowed:
                raise ConfigError(
                    f"magnorm mode {mode!r} has no parameter {name!r}; it allows "
                    f"{', '.join(entry.parameters) or 'none'}"
                )
            allowed[name].check(name, value)
        values = {n: parameters.get(n, p.default) for n, p in entry.parameters.items()}
        object.__setattr__(self, "mode", mode)
        object.__setattr__(self, "parameters", tuple(values.items()))

    def __getattr__(self, name: str) -> float:
        # Not through self.parameters: copying asks a half-made object for other names.
        for known, value in self.__dict__.get("parameters", ()):
            if known == name:
                return float(value)
        raise AttributeError(f"MagNorm has no attribute {name!r}")

    def __repr__(self) -> str:
        values = "".join(f", {name}={value!r}" for name, value in self.parameters)
        return f"MagNorm({self.mode!r}{values})"

    @classmethod
    def from_json(cls, raw: Mapping[str, Any] | None) -> MagNorm:
        """Parse the ``magnorm`` key; null is mode ``none``.

        Raises:
            ConfigError: not an object, no or an unknown mode, an unknown or bad parameter.
        """
        if raw is None:
            return cls()
        if not isinstance(raw, Mapping):
            raise ConfigError(
                f"magnorm: got {raw!r}, must be null or an object such as {{'mode': 'bounded'}}"
            )
        if "mode" not in raw:
            raise ConfigError(f"magnorm needs 'mode'; got {sorted(raw)}")
        entry = get_mode(raw["mode"])
        allowed = {"mode", *_ALWAYS_ALLOWED, *entry.parameters}
        if unknown := sorted(set(raw) - allowed):
            own = ", ".join(entry.parameters) or "no parameters"
            raise ConfigError(
                f"magnorm needs 'mode' and, for {raw['mode']}, allows {own}; got {unknown}"
            )
        return cls(**raw)

    def to_json(self) -> dict[str, Any] | None:
        """Return the mode and what it reads; null for ``none``."""
        return None if self.mode == "none" else {"mode": self.mode} | dict(self.parameters)

    @property
    def entry(self) -> Mode:
        """The registered mode."""
        return get_mode(self.mode)

    @property
    def foldable(self) -> bool:
        """Whether W' is a function of W and Δ alone, so that it can be merged or served."""
        return self.entry.foldable

    @property
    def additive(self) -> bool:
        """Whether W' is exactly W + Δ, so that the update stays C·U·R."""
        return self.entry.additive

    @property
    def combinable(self) -> bool:
        """Whether several adapters, or one with a weight, may be summed before the norm."""
        return self.entry.combinable

    @property
    def needs_rho_max(self) -> bool:
        """Whether the adapter stores ρ_max of every module."""
        return self.entry.needs_rho_max

    def rho_max_of(self, W: Tensor, delta: Tensor) -> Tensor | None:
        """Return ρ_max of the final Δ ``(out, in)`` where the mode needs it, else None."""
        if not self.needs_rho_max:
            return None
        eps = dict(self.parameters).get("eps", PARAMETERS["eps"].default)
        return rho_max(W.to(delta.dtype), delta, eps)

    def check_foldable(self) -> None:
        """Raise ConfigError where there is no W'."""
        if not self.foldable:
            raise ConfigError(
                f"magnorm mode {self.mode!r} acts on activations and has no merged weight; "
                f"foldable modes: {', '.join(foldable_modes())}"
            )


def rho_max(W: Tensor, delta: Tensor, eps: float = 1e-8) -> Tensor:
    """Return max of ρ = |Δ| / (|W| + ε) over the whole matrix: a scalar in Δ's dtype."""
    return change_ratio(W, delta, eps).max()


def apply(W: Tensor, delta: Tensor, norm: MagNorm, *, peak: RhoMax = None) -> Tensor:
    """Return W' of the total update ``delta`` against the pristine ``W`` (same shape and dtype).

    Where nothing wants a gradient these are the bits that :func:`write` writes.

    Args:
        peak: ρ_max of the whole module's final Δ; None takes it from this ``delta``.

    Raises:
        ConfigError: the mode works on activations and has no W'.
    """
    norm.check_foldable()
    trained = torch.is_grad_enabled() and (W.requires_grad or delta.requires_grad)
    if not trained and norm.entry.native is not None and native.is_supported(W, W, delta):
        write(new := torch.empty_like(W), W, delta, norm, peak=peak)
        return new
    return norm.entry.apply(W, delta, dict(norm.parameters), peak)


def derivative(W: Tensor, delta: Tensor, norm: MagNorm, *, peak: RhoMax = None) -> Tensor:
    """Return ∂W'/∂Δ at the total update ``delta``, elementwise and ``(out, in)``.

    This is what autograd of :func:`apply` multiplies by, in a quarter of its time.

    Raises:
        ConfigError: the mode has no W'.
    """
    norm.check_foldable()
    return norm.entry.differentiate(W, delta, dict(norm.parameters), peak)


def apply_to_activations(y: Tensor, delta: Tensor, norm: MagNorm) -> Tensor:
    """Return the adapted layer's output; computed in float32 at least, in y's dtype.

    Args:
        y, delta: ``(..., out)``, what the base layer and the adapter give; any floating dtype.
        norm: of a mode that acts on activations.

    Raises:
        ConfigError: the mode acts on weights.
    """
    if norm.foldable:
        raise ConfigError(f"magnorm mode {norm.mode!r} acts on weights: use magnorm.apply")
    wide = torch.promote_types(torch.promote_types(y.dtype, delta.dtype), torch.float32)
    return norm.entry.apply(y.to(wide), delta.to(wide), dict(norm.parameters), None).to(y.dtype)


def write(
    out: Tensor,
    W: Tensor,
    update: Update,
    norm: MagNorm,
    *,
    peak: RhoMax = None,
    measure: bool = False,
) -> FoldStats | None:
    """Put W', computed in Δ's dtype and rounded once, into ``out``: one pass over a CPU's memory.

    Args:
        out, W: ``(out, in)``; their dtypes may be narrower than the update's.
        update: Δ, or L ``(out, k)`` and R ``(k, in)`` with Δ = L·R, which then never exists whole
            (a mode that needs ρ_max needs it as ``peak`` for that).
        measure: also return what changed.

    Returns:
        What changed; None where it was not asked for and would cost something.

    Raises:
        ConfigError: the mode has no W'.
    """
    norm.check_foldable()
    if norm.needs_rho_max and peak is None:
        update = update if isinstance(update, Tensor) else product(*update)
        peak = norm.rho_max_of(W, update)
    form = norm.entry.native
    if form is not None and native.is_supported(out, W, update):
        values = dict(norm.parameters)
        a, b = (0.0 if name is None else values[name] for name in form.arguments)
        return native.write(out, W, update, form.form, a, b, float(peak or 0))
    if not isinstance(update, Tensor):
        stats = [
            write(out[at], W[at], delta, norm, peak=peak, measure=measure)
            for at, delta in blocks(*update)
        ]
        return FoldStats.total(s for s in stats if s) if None not in stats else None
    wide = W.to(update.dtype)
    new = apply(wide, update, norm, peak=peak)
    out.copy_(new)
    return measure_change(wide, new, out) if measure else None
