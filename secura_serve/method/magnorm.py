"""S-MagNorm: how the total update Δ of a weight W becomes the adapted weight W'.

Every foldable mode is a pure function of ``(W, Δ)``, elementwise but for one scalar. Derived from
the figure of SECURA (arXiv 2502.18168); ``bounded`` is ours.

===========  ====================================================  ===========================
mode         W'                                                    at Δ = 0
===========  ====================================================  ===========================
none         W + Δ                                                 W
published    (2W + Δ) / (2 − σ(s·(ρ/ρ_max − ½)))                   W if ρ_max = 0, else ~1.024·W
bounded      W + τ|W|·(2σ(2Δ / (τ|W|)) − 1)                        W, with slope 1
===========  ====================================================  ===========================

with ρ = |Δ| / (|W| + ε). ``published`` does not tend to W as Δ → 0: it rescales by 1.024 where ρ
is near 0 and by up to 1.91 at ρ_max. ``bounded`` guarantees |W' − W| ≤ τ|W| for every weight.
The modes ``reference`` and ``activation`` have no W': see :mod:`secura_serve.method.activation`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from secura_serve.errors import ConfigError
from secura_serve.method import native
from secura_serve.method.native import Update
from secura_serve.method.product import blocks, product
from secura_serve.method.sums import Sums, weigh

__all__ = [
    "FOLDABLE",
    "MODES",
    "MagNorm",
    "apply",
    "bounded",
    "divisor",
    "published",
    "rho_max",
    "write",
]

FOLDABLE = ("none", "published", "bounded")
MODES = (*FOLDABLE, "reference", "activation")


@dataclass(frozen=True)
class MagNorm:
    """One S-MagNorm setting, as it stands under ``magnorm`` in ``adapter_config.json``."""

    mode: str = "none"
    tau: float = 0.02
    """``bounded``: largest relative change of a weight; smaller keeps more and learns less."""
    scale: float = 6.0
    """``published``: steepness s of the sigmoid."""
    eps: float = 1e-8
    """Keeps ρ finite where W is 0."""

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ConfigError(f"unknown magnorm mode {self.mode!r}; allowed: {', '.join(MODES)}")
        for name in ("tau", "scale", "eps"):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not 0 < value <= sys.float_info.max:
                raise ConfigError(f"magnorm.{name} must be a finite number > 0, got {value!r}")

    @classmethod
    def from_json(cls, raw: Mapping[str, Any] | None) -> MagNorm:
        """Parse the ``magnorm`` key; null is mode ``none``. Raises ConfigError on unknown keys."""
        if raw is None:
            return cls()
        if not isinstance(raw, Mapping):
            raise ConfigError(f"magnorm must be null or an object, got {raw!r}")
        unknown = sorted(set(raw) - {"mode", "tau", "scale", "eps"})
        if unknown or "mode" not in raw:
            raise ConfigError(f"magnorm needs 'mode' and allows tau, scale, eps; got {sorted(raw)}")
        return cls(**raw)

    def to_json(self) -> dict[str, Any] | None:
        """Only what the mode reads; null for ``none``."""
        used = {"bounded": ("tau",), "none": ()}.get(self.mode, ("scale", "eps"))
        if self.mode == "none":
            return None
        return {"mode": self.mode} | {name: getattr(self, name) for name in used}

    @property
    def foldable(self) -> bool:
        """Whether W' is a function of W and Δ alone, so that it can be merged or served."""
        return self.mode in FOLDABLE

    def check_foldable(self) -> None:
        """Raises ConfigError where there is no W'."""
        if not self.foldable:
            raise ConfigError(
                f"magnorm mode {self.mode!r} acts on activations and has no merged weight; "
                f"foldable modes: {', '.join(FOLDABLE)}"
            )


def rho_max(W: Tensor, delta: Tensor, eps: float = 1e-8) -> Tensor:
    """max of ρ = |Δ| / (|W| + ε) over the whole matrix: a scalar in Δ's dtype."""
    return (delta.abs() / (W.abs() + eps)).max()


def published(
    W: Tensor, delta: Tensor, *, scale: float = 6.0, eps: float = 1e-8, peak: Tensor | float | None
) -> Tensor:
    """``(2W + Δ) / Res``, ``Res = 2 − σ(s·(ρ/ρ_max − ½))``; Res is detached, as in the reference.

    Args:
        W, delta: ``(out, in)``, same floating dtype.
        peak: ρ_max of the whole module's final Δ; None takes it from this ``delta``. Where it
            is 0, W' = W, with slope 1: a core that starts at zero could not leave it otherwise.
    """
    res, top = divisor(W, delta.detach(), scale, eps, peak)
    return torch.where(top > 0, (2 * W + delta) / res, W + delta)


def divisor(
    W: Tensor, delta: Tensor, scale: float, eps: float, peak: Tensor | float | None
) -> tuple[Tensor, Tensor]:
    """Res of ``published``, and ρ_max; where that is 0, Res means nothing."""
    rho = delta.abs() / (W.abs() + eps)
    top = torch.as_tensor(rho.max() if peak is None else peak, dtype=W.dtype, device=W.device)
    safe = torch.where(top > 0, top, torch.ones_like(top))
    return 2 - torch.sigmoid(scale * (rho / safe - 0.5)), top


def bounded(W: Tensor, delta: Tensor, *, tau: float = 0.02) -> Tensor:
    """``W + τ|W|·(2σ(2Δ/(τ|W|)) − 1)``; the sigmoid costs a tenth of the equal ``tanh(Δ/(τ|W|))``.

    Where τ|W| is zero or subnormal, W' = W and the gradient is 0; the choice is made before the
    division, because 0·inf in the backward pass would give NaN.
    """
    reach = tau * W.abs()
    tiny = torch.finfo(W.dtype).tiny
    # Choosing costs more than the rest. On other devices, looking first would make them wait.
    if W.device.type == "cpu" and W.numel() and bool(reach.detach().amin() >= tiny):
        return W + reach * (2 * torch.sigmoid(2 * (delta / reach)) - 1)
    live = reach >= tiny
    ratio = torch.where(live, delta, torch.zeros_like(delta)) / torch.where(
        live, reach, torch.ones_like(reach)
    )
    return torch.where(live, W + reach * (2 * torch.sigmoid(2 * ratio) - 1), W)


def apply(W: Tensor, delta: Tensor, norm: MagNorm, *, peak: Tensor | float | None = None) -> Tensor:
    """W' of the total update ``delta`` against the pristine ``W`` (same shape and dtype).

    Where nothing wants a gradient these are the bits that :func:`write` writes.

    Raises:
        ConfigError: the mode works on activations and has no W'.
    """
    norm.check_foldable()
    trained = torch.is_grad_enabled() and (W.requires_grad or delta.requires_grad)
    if not trained and native.fits(W, W, delta):
        write(made := torch.empty_like(W), W, delta, norm, peak=peak)
        return made
    if norm.mode == "published":
        return published(W, delta, scale=norm.scale, eps=norm.eps, peak=peak)
    return bounded(W, delta, tau=norm.tau) if norm.mode == "bounded" else W + delta


def write(
    out: Tensor,
    W: Tensor,
    update: Update,
    norm: MagNorm,
    *,
    peak: Tensor | float | None = None,
    measure: bool = False,
) -> Sums | None:
    """Put W', computed in Δ's dtype and rounded once, into ``out``: one pass over a CPU's memory.

    Args:
        out, W: ``(out, in)``; their dtypes may be narrower than the update's.
        update: Δ, or L ``(out, k)`` and R ``(k, in)`` with Δ = L·R, which then never exists whole
            (``published`` needs a ``peak`` for that).
        measure: also say what changed.

    Returns:
        What changed; None where it was not asked for and would cost something.

    Raises:
        ConfigError: the mode has no W'.
    """
    if norm.mode == "published" and peak is None:
        update = update if isinstance(update, Tensor) else product(*update)
        peak = rho_max(W.to(update.dtype), update, norm.eps)
    if norm.foldable and native.fits(out, W, update):
        a, b = (norm.tau, 0.0) if norm.mode == "bounded" else (norm.scale, norm.eps)
        return native.write(out, W, update, norm.mode, a, b, float(peak or 0))
    if not isinstance(update, Tensor):
        found = [
            write(out[at], W[at], delta, norm, peak=peak, measure=measure)
            for at, delta in blocks(*update)
        ]
        return Sums.total(sums for sums in found if sums) if None not in found else None
    wide = W.to(update.dtype)
    made = apply(wide, update, norm, peak=peak)
    out.copy_(made)
    return weigh(wide, made, out) if measure else None
