"""The CUR half of vLLM's linear LoRA layers: slots of U, the shared C, and the adapter step.

Mixed into each of vLLM's linear LoRA classes (see ``compat.install``), whose own A and B are
made only where plain LoRA is served as well. A layer is inert until
:meth:`CURLinearMixin.install_basis`; without a basis it costs nothing. Memory of a layer besides
its part of the bank: C, ``r·out`` numbers, or ``n·r·out`` where torch takes the step, with n packed
linears (q, k and v; gate and up); and, where ranks share its outputs, R, ``n·r·in`` numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.distributed import tensor_model_parallel_all_reduce

from secura_serve.errors import UnservableError
from secura_serve.method import Basis
from secura_serve.serve import compat
from secura_serve.serve.engine import lora_step, row_product  # noqa: F401  (register ops)
from secura_serve.serve.engine.delta_layer import DeltaLinearMixin
from secura_serve.serve.kernels import Layout, choose_kernel
from secura_serve.serve.names import CONFIG_KEY

__all__ = ["CURLinearMixin"]


# Inputs that are pushed through a base linear at once, to read its rows.
_ONE_HOTS = 512


class CURLinearMixin(DeltaLinearMixin):
    """y' = y + C_s·(U_slot·(y_s − b_s)[rows]) for each slice s of a packed linear."""

    lora: Tensor | None = None
    """``(slots + 1,)`` bool, which slots hold a plain LoRA, given by the manager; None where there
    are none to serve, and vLLM's own A and B are not made."""

    bank: Tensor | None = None
    """This linear's part of the bank, ``(slots + 1, *layout)``, given by the manager."""
    ranks: Tensor
    """``(slots + 1,)`` int32, given by the manager."""
    R: Tensor | None
    """``(n·r, in)``, the rows of a linear whose outputs are split over ranks; else None."""
    active: Tensor
    """``()`` bool on the CPU, given by the manager: whether any token has a CUR adapter."""
    activation: str | None = None
    """What follows this linear and takes its step along (:meth:`activated`); None where the step is
    taken at once."""
    takes_linear: bool = False
    """Whether the kernel multiplies with the base linear's weight in that linear's place."""

    # Given by the vLLM class that this is mixed into.
    punica_wrapper: Any
    lora_a_stacked: tuple[Tensor, ...]
    lora_b_stacked: tuple[Tensor, ...]
    output_size: int

    def create_lora_weights(
        self, max_loras: int, lora_config: Any, model_config: Any = None
    ) -> None:
        """Make vLLM's own A and B where plain LoRA is served; the bank is the manager's."""
        if get_current_vllm_config().additional_config[CONFIG_KEY]["plain_lora"]:
            super().create_lora_weights(max_loras, lora_config, model_config)  # type: ignore[misc]
        self.lora_config = lora_config
        if "output_slices" not in self.__dict__:
            self.output_slices: tuple[int, ...] = (self.output_size,)

    @torch.no_grad()
    def install_basis(self, bases: Sequence[Basis | None]) -> Layout | None:
        """Gather C, once, in the same order on every rank; returns what the bank must hold.

        Args:
            bases: one per slice, indices into that slice's whole (unsharded) W; None where no
                adapter touches it.
        """
        if all(basis is None for basis in bases):
            return None
        if len(bases) != self.n_slices:
            raise UnservableError(f"{len(bases)} modules for a linear of {self.n_slices} slices")
        self.refuse_fused_shards()
        n, r = self.n_slices, max(max(len(b.rows), len(b.cols)) if b else 0 for b in bases)
        dtype = self.lora_config.lora_dtype
        self.kernel = choose_kernel(self.device, dtype)
        layout = self.kernel.layout(n, r, dtype)
        starts = [0, *accumulate(self.output_slices)]
        rows = torch.full((n, layout.r), -1)
        owned = torch.zeros(n, layout.r, dtype=torch.bool)
        C = torch.zeros(layout.r, starts[-1], dtype=dtype, device=self.device)
        for s, basis in enumerate(bases):
            if basis is not None:
                local, mine = self._local_rows(s, basis.rows, self.output_slices[s])
                rows[s, : len(local)] = starts[s] + local
                owned[s, : len(local)] = mine
                at = slice(starts[s], starts[s + 1])
                C[: len(basis.cols), at] = self._columns(basis.cols)[:, at]
        self.R = None
        if self.sharded_out:
            # A row is another rank's: R x is worked out here, without asking for it at every step.
            self.R = self._rows(rows.flatten(), owned.flatten()).to(dtype)
            rows, offset = torch.arange(n * layout.r).view(n, -1), None
        else:
            offset = self._bias_at(rows.clamp(min=0).flatten().to(self.device))
        self.state = self.kernel.prepare(rows, C, offset, starts)
        weight = compat.plain_weight(self) if self.kernel.takes_linear else None
        self.takes_linear = weight is not None and weight.dtype == dtype
        return layout

    def _local_rows(self, s: int, rows: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """Return where global ``rows`` are in this rank's slice, and which are its own."""
        if not self.sharded_out:
            return rows, torch.ones_like(rows)
        shard = self.shard_of(s)
        mine = (rows >= shard * size) & (rows < (shard + 1) * size)
        # Ranks that hold copies of one KV head must not count its rows twice.
        if self.tp_rank % compat.kv_head_copies(self, s):
            mine = torch.zeros_like(mine)
        return torch.where(mine, rows - shard * size, 0), mine

    def _rows(self, rows: Tensor, owned: Tensor) -> Tensor:
        """Return rows of W on every rank, each from the rank that owns it: ``(len(rows), in)``."""
        width, device = self.input_size, self.device
        R = torch.zeros(len(rows), width, dtype=self.base_layer.params_dtype, device=device)
        held, at = owned.nonzero().squeeze(-1).to(device), rows[owned].to(device)
        for first in range(0, width, _ONE_HOTS):
            inputs = torch.arange(first, min(first + _ONE_HOTS, width), device=device)
            one_hot = torch.nn.functional.one_hot(inputs, width).to(R.dtype)
            columns = compat.base_linear(self, one_hot)
            R[held, first : first + _ONE_HOTS] = columns[:, at].T.to(R.dtype)
        whole: Tensor = tensor_model_parallel_all_reduce(R)
        return whole

    def _columns(self, cols: Tensor) -> Tensor:
        """Return columns of W as ``(len(cols), out)``, by one-hot inputs to the base's kernel.

        Packed, quantised and prepacked weights have no plain columns to read.
        """
        width = self.base_layer.input_size_per_partition if self.sharded_in else self.input_size
        first = self.tp_rank * width if self.sharded_in else 0
        one_hot = torch.zeros(
            len(cols), width, dtype=self.base_layer.params_dtype, device=self.device
        )
        place = cols - first
        held = ((place >= 0) & (place < width)).nonzero().squeeze(-1)
        one_hot[held.to(self.device), place[held].to(self.device)] = 1
        columns = compat.base_linear(self, one_hot)
        if self.sharded_in:
            columns = tensor_model_parallel_all_reduce(columns)
        return columns

    def _bias_at(self, rows: Tensor) -> Tensor | None:
        """Return the bias that the base output holds at ``rows``, to be taken off again."""
        bias = self.base_layer.bias
        if bias is None or self.base_layer.skip_bias_add or (self.sharded_in and self.tp_rank):
            return None
        at_rows: Tensor = bias.detach()[rows].to(self.lora_config.lora_dtype)
        return at_rows

    def reset_lora(self, index: int) -> None:
        """Empty a slot of plain LoRA; the manager fills the bank for all linears at once."""
        if self.lora is not None:
            super().reset_lora(index)  # type: ignore[misc]

    def set_lora(self, index: int, lora_a: Any, lora_b: Any) -> None:
        """Fill a slot of plain LoRA: a CUR adapter has no module of any linear's name."""
        super().set_lora(index, lora_a, lora_b)  # type: ignore[misc]

    def apply_linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return the base linear's output with each token's adapter applied."""
        if self.bank is None or not self.takes_linear or self.activation is not None:
            return self.apply_adapter(x, compat.base_linear(self, x, bias))
        into, slots = self._batch(x)
        given = (into, self.base_layer.weight, bias, self.R, slots)
        y = self._apply_others(into, self.kernel.linear(*given, *self._held()), slots)
        return y.view(*x.shape[:-1], y.shape[-1])

    def apply_adapter(self, x: Tensor, output: Tensor) -> Tensor:
        """Return ``output``, what the base linear made of x, with each token's adapter applied."""
        y = output.reshape(-1, output.shape[-1])
        into, slots = self._batch(x)
        if self.bank is not None and self.activation is None:
            y = self.kernel.step(y, self._source(into), slots, *self._held())
        return self._apply_others(into, y, slots).view(output.shape)

    def _batch(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return x as ``(T, in)``, and each token's slot.

        The Transformers backend puts a dimension of 1 in front; vLLM's LoRA step sizes its buffer
        by the first one.
        """
        into = x.reshape(-1, x.shape[-1])
        return into, compat.token_slots(self.punica_wrapper)[: into.shape[0]]

    def _apply_others(self, x: Tensor, y: Tensor, slots: Tensor) -> Tensor:
        """Return y with full-rank updates and plain LoRA applied."""
        self.apply_deltas(y, x, slots)
        if self.lora is not None and self.device.type == "cpu":
            A, B = list(self.lora_a_stacked), list(self.lora_b_stacked)
            torch.ops.secura_lora.step_(y, x, slots, self.lora, A, B)
        elif self.lora is not None:
            y = compat.apply_stock_lora(self, x, y)
        return y

    @property
    def begins_beside(self) -> bool:
        """Whether a part of the step runs beside the base linear, where the kernel takes that."""
        if self.activation is None:
            return self.takes_linear
        # What else changes the output comes between the linear and the activation.
        alone = self.deltas is None and self.lora is None
        return self.takes_linear and alone and not self.base_layer.gather_output

    def can_activate(self, activation: str) -> bool:
        """Return whether the step is better taken together with the gated activation after it."""
        pair = self.n_slices == 2 and self.output_slices[0] == self.output_slices[1]
        return self.bank is not None and pair and activation in self.kernel.fuses

    def activated(self, x: Tensor) -> Tensor:
        """Return act(gate')·up' of each token's adapted output for this linear's input x.

        Plain LoRA and full-rank updates change the output before that; a token has one kind of
        adapter, and the U of these kinds is zero.
        """
        base, (into, slots) = self.base_layer, self._batch(x)
        if self.begins_beside:
            bias = None if base.skip_bias_add else base.bias
            given = (into, base.weight, bias, self.R, slots, *self._held(), self.activation)
            made: Tensor = self.kernel.linear(*given)
            return made.view(*x.shape[:-1], made.shape[-1])
        output, _ = self.forward(x)  # type: ignore[attr-defined]
        y = output.reshape(-1, output.shape[-1])
        held = (*self._held(), self.activation)
        made = self.kernel.activated_step(y, self._source(into), slots, *held)
        return made.view(*output.shape[:-1], -1)

    def _source(self, x: Tensor) -> Tensor | None:
        """Return R x where ranks share the outputs; elsewhere it is in the output itself."""
        if self.R is None:
            return None
        product: Tensor = torch.ops.secura_rows.product(
            x, self.R, self.active, not self.kernel.skips
        )
        return product

    def _held(self) -> tuple[Any, ...]:
        """Return what the kernel's step takes besides a batch."""
        return self.bank, self.ranks, self.state, self.active
