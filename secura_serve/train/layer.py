"""The CUR adapters on one linear layer: their state, Δ, merge, unmerge and export."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from secura_serve.adapter import CURModule
from secura_serve.errors import UnservableError
from secura_serve.method import Basis, MagNorm, apply, auto_alpha, delta, init_A, select
from secura_serve.method.magnorm import rho_max
from secura_serve.train.config import SecuraConfig

__all__ = ["SecuraLayer"]


class SecuraLayer(BaseTunerLayer):
    """State of the adapters on one ``nn.Linear`` or ``Conv1D``; W is ``(out, in)`` throughout.

    Trained, float32: ``secura_U`` (r, r), or ``secura_A`` (r, m) and ``secura_B`` (m, r).
    ``secura_rows`` and ``secura_cols`` are buffers outside the state dict; C and R are views of
    the base, gathered when needed.
    """

    adapter_layer_names = ("secura_U", "secura_A", "secura_B")
    other_param_names = ("secura_rows", "secura_cols", "secura_alpha", "secura_norm")

    base_layer: nn.Module

    def __init__(self, base_layer: nn.Module, module: str) -> None:
        self.base_layer = base_layer
        self.module = module
        self.secura_U = nn.ParameterDict()
        self.secura_A = nn.ParameterDict()
        self.secura_B = nn.ParameterDict()
        self.secura_rows = BufferDict(persistent=False)
        self.secura_cols = BufferDict(persistent=False)
        self.secura_alpha: dict[str, float] = {}
        self.secura_norm: dict[str, MagNorm] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._kept: Tensor | None = None
        self.transposed = isinstance(base_layer, Conv1D)
        self.out_features, self.in_features = self.pristine.shape

    @property
    def pristine(self) -> Tensor:
        """W ``(out, in)`` as it was before any merge."""
        W = self.get_base_layer().weight.data if self._kept is None else self._kept
        return W.T if self.transposed else W

    def base_bias(self) -> Tensor | None:
        """The base layer's bias ``(out,)``, where it has one."""
        bias: Tensor | None = self.get_base_layer().bias
        return bias

    def applied(self) -> list[str]:
        """The adapters that the forward pass must add: none while disabled or merged."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged:
            return []
        return [name for name in self.active_adapters if name in self.secura_alpha]

    def update_layer(self, name: str, config: SecuraConfig) -> None:
        """Add adapter ``name``: choose its basis from W and create its core, Δ = 0.

        Raises:
            ConfigError: the rank does not fit W.
        """
        W = self.pristine
        rule, seed = config.selection["rule"], config.selection["seed"]
        basis = select(W, config.r, module=self.module, rule=rule, seed=seed)
        alpha = auto_alpha(W, basis) if config.alpha == "auto" else float(config.alpha)
        self._place(name, basis, alpha, config.norm)
        options: dict[str, Any] = {"dtype": torch.float32, "device": W.device}
        if config.core == "u":
            self.secura_U[name] = nn.Parameter(torch.zeros(config.r, config.r, **options))
        else:
            m = config.inner_rank or config.r
            self.secura_A[name] = nn.Parameter(init_A(W, config.r, m, config.init))
            self.secura_B[name] = nn.Parameter(torch.zeros(m, config.r, **options))
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _place(self, name: str, basis: Basis, alpha: float, norm: MagNorm) -> None:
        device = self.pristine.device
        self.secura_rows[name] = basis.rows.to(device, torch.int64)
        self.secura_cols[name] = basis.cols.to(device, torch.int64)
        self.secura_alpha[name] = alpha
        self.secura_norm[name] = norm

    def load_core(self, name: str, cur: CURModule, norm: MagNorm) -> None:
        """Take an effective core and its indices, as they stand in a file; alpha becomes 1.

        A core that was trained as A·B continues as U: the factors are not in the file.
        """
        held = (self.secura_U, self.secura_A, self.secura_B)
        trainable = any(values[name].requires_grad for values in held if name in values)
        self._place(name, cur.basis, 1.0, norm)
        for factors in (self.secura_A, self.secura_B):
            if name in factors:
                del factors[name]
        U = cur.U.to(self.pristine.device, torch.float32, copy=True)
        self.secura_U[name] = nn.Parameter(U, requires_grad=trainable)

    def core(self, name: str) -> Tensor:
        """The effective core ``s·U`` or ``s·A·B``, ``(r, r)`` float32; differentiable."""
        if name in self.secura_U:
            U: Tensor = self.secura_U[name]
        else:
            U = self.secura_A[name] @ self.secura_B[name]
        return self.secura_alpha[name] * U

    def basis(self, name: str) -> Basis:
        """The rows and columns of adapter ``name``."""
        return Basis(self.secura_rows[name], self.secura_cols[name])

    def common_norm(self, names: Sequence[str]) -> MagNorm:
        """The one norm of ``names``.

        Raises:
            UnservableError: they differ, or are several with ``published``.
        """
        norms = {self.secura_norm[n] for n in names}
        mode = next(iter(norms)).mode
        if len(norms) > 1 or (mode == "published" and len(names) > 1):
            raise UnservableError(
                f"{self.module}: adapters {', '.join(names)} cannot be combined: S-MagNorm acts on "
                "the total update, so mode and tau must agree, and 'published' takes one adapter"
            )
        return next(iter(norms))

    def total_delta(self, names: Sequence[str], dtype: torch.dtype | None = None) -> Tensor:
        """Σ Δ of ``names`` before any norm, ``(out, in)``."""
        W = self.pristine
        dtype = dtype or torch.promote_types(W.dtype, torch.float32)
        parts = [delta(W, self.basis(n), self.core(n), dtype=dtype) for n in names]
        return torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]

    def merged_weight(self, names: Sequence[str]) -> Tensor:
        """W' = S-MagNorm(W, Σ Δ), ``(out, in)``, at least float32; differentiable in the cores."""
        norm, update = self.common_norm(names), self.total_delta(names)
        return apply(self.pristine.to(update.dtype), update, norm)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """W' − W of one adapter, ``(out, in)``: PEFT's name for it."""
        new = self.merged_weight([adapter])
        return new - self.pristine.to(new.dtype)

    @torch.no_grad()
    def export(self, name: str) -> CURModule:
        """The adapter's tensors as they go to disk."""
        peak = None
        norm = self.secura_norm[name]
        if norm.mode == "published":
            update = self.total_delta([name], torch.float32)
            peak = float(rho_max(self.pristine.to(torch.float32), update, norm.eps))
        basis = self.basis(name)
        return CURModule(
            U=self.core(name).detach().to("cpu", torch.float32).clone(),
            rows=basis.rows.to("cpu", torch.int32),
            cols=basis.cols.to("cpu", torch.int32),
            rho_max=peak,
        )

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write W' of the merged and the named adapters into the base, always from pristine W.

        Raises:
            ValueError: ``safe_merge`` and W' is not finite.
        """
        names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.secura_alpha]
        if not names:
            return
        layer = self.get_base_layer()
        W = self.merged_weight([*self.merged_adapters, *names]).to(layer.weight.dtype)
        if safe_merge and not torch.isfinite(W).all():
            raise ValueError(f"{self.module}: merging {', '.join(names)} gives NaN or Inf")
        if self._kept is None:
            self._kept = layer.weight.data
        layer.weight.data = W.T.contiguous() if self.transposed else W
        self.merged_adapters += names

    def unmerge(self) -> None:
        """Put the kept pristine tensor back: bit exact, never a subtraction."""
        if self._kept is None:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self.get_base_layer().weight.data = self._kept
        self._kept = None
        self.merged_adapters.clear()

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        """Device only: PEFT would also round the float32 core to the base's dtype."""
        device = device or self.pristine.device
        for values in (self.secura_U, self.secura_A, self.secura_B):
            if adapter_name in values:
                values[adapter_name].data = values[adapter_name].data.to(device)
        for values in (self.secura_rows, self.secura_cols):
            values[adapter_name] = values[adapter_name].to(device)
