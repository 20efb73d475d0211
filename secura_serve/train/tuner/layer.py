"""``SecuraLayer``: Δ, merge, unmerge and export of the CUR adapters on one linear layer."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor

from secura_serve.adapter import CURModule
from secura_serve.errors import UnservableError
from secura_serve.method import Basis, MagNorm, delta, write
from secura_serve.train.tuner.config import SecuraConfig
from secura_serve.train.tuner.state import AdapterState

__all__ = ["SecuraLayer"]


class SecuraLayer(AdapterState):
    """The CUR adapters on one ``nn.Linear`` or ``Conv1D``, and what they do to its weight."""

    def update_layer(self, name: str, config: SecuraConfig) -> None:
        """Add adapter ``name`` with Δ = 0.

        Raises:
            ConfigError: the rank does not fit W.
        """
        self.create(name, config)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def base_bias(self) -> Tensor | None:
        """Return the base layer's bias ``(out,)``, or None."""
        bias: Tensor | None = self.get_base_layer().bias
        return bias

    def applied(self) -> list[str]:
        """Return the adapters that the forward pass must add: none while disabled or merged."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged:
            return []
        return [name for name in self.active_adapters if name in self.secura_alpha]

    def common_norm(self, names: Sequence[str]) -> MagNorm:
        """Return the S-MagNorm that ``names`` have in common.

        Raises:
            UnservableError: they differ, or the norm allows one adapter only and there are more.
        """
        norms = {self.secura_norm[n] for n in names}
        if len(norms) > 1 or (len(names) > 1 and not next(iter(norms)).combinable):
            raise UnservableError(
                f"{self.module}: adapters {', '.join(names)} cannot be combined: S-MagNorm acts on "
                "the total update, so mode and parameters must agree, and not every mode takes "
                "more than one adapter"
            )
        return next(iter(norms))

    def foldable_norm(self, names: Sequence[str]) -> MagNorm:
        """Return the common S-MagNorm of ``names``, if it gives a W'.

        Raises:
            UnservableError: it acts on activations, or see :meth:`common_norm`.
        """
        norm = self.common_norm(names)
        if not norm.foldable:
            raise UnservableError(
                f"{self.module}: S-MagNorm {norm.mode!r} of {', '.join(names)} acts on "
                "activations, so no weight gives the same outputs: it cannot be merged or mixed. "
                "Use it as it is, or train with 'bounded'"
            )
        return norm

    def total(self, names: Sequence[str]) -> tuple[Basis, Tensor]:
        """Return ``names`` as one adapter: bases one after another, cores in a block diagonal."""
        if len(names) == 1:
            return self.basis(names[0]), self.core(names[0])
        rows, cols = zip(*(self.basis(n) for n in names), strict=True)
        cores = torch.block_diag(*(self.core(n) for n in names))
        return Basis(torch.cat(rows), torch.cat(cols)), cores

    def total_delta(self, names: Sequence[str]) -> Tensor:
        """Return Σ Δ of ``names`` before any norm, ``(out, in)``, in at least float32."""
        W, (basis, core) = self.pristine, self.total(names)
        return delta(W, basis, core, dtype=torch.promote_types(W.dtype, torch.float32))

    @torch.no_grad()
    def merged_weight(self, names: Sequence[str], dtype: torch.dtype | None = None) -> Tensor:
        """Return W' = S-MagNorm(W, Σ Δ), ``(out, in)``; ``dtype`` is at least float32 by default.

        Raises:
            UnservableError: there is no such weight.
        """
        norm, update = self.foldable_norm(names), self.total_delta(names)
        new_W = torch.empty_like(self.pristine, dtype=dtype or update.dtype)
        write(new_W, self.pristine, update, norm)
        return new_W

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return W' − W of one adapter, ``(out, in)``; PEFT calls it by this name."""
        new_W = self.merged_weight([adapter])
        return new_W - self.pristine.to(new_W.dtype)

    @torch.no_grad()
    def export(self, name: str) -> CURModule:
        """Return the adapter's tensors as they are written to disk."""
        rho_max = None
        norm = self.secura_norm[name]
        if norm.needs_rho_max:
            rho_max = norm.rho_max_of(self.pristine, self.total_delta([name]))
        basis = self.basis(name)
        return CURModule(
            U=self.core(name).detach().to("cpu", torch.float32).clone(),
            rows=basis.rows.to("cpu", torch.int32),
            cols=basis.cols.to("cpu", torch.int32),
            rho_max=None if rho_max is None else float(rho_max),
        )

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write W' of the merged and the named adapters into the base, always from pristine W.

        Raises:
            UnservableError: the adapters have no W', or their norms differ.
            ValueError: ``safe_merge`` and W' is not finite.
        """
        names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.secura_alpha]
        if not names:
            return
        layer = self.get_base_layer()
        W = self.merged_weight([*self.merged_adapters, *names], layer.weight.dtype)
        if safe_merge and not torch.isfinite(W).all():
            raise ValueError(f"{self.module}: merging {', '.join(names)} gives NaN or Inf")
        if self._unmerged is None:
            self._unmerged = layer.weight.data
        layer.weight.data = W.T.contiguous() if self.transposed else W
        self.merged_adapters += names

    def unmerge(self) -> None:
        """Put the unmerged tensor back: bit exact, because nothing is subtracted."""
        if self._unmerged is None:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self.get_base_layer().weight.data = self._unmerged
        self._unmerged = None
        self.merged_adapters.clear()
