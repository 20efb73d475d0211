"""The CUR half of vLLM's linear LoRA layers: slots of U, the shared C, and the adapter step.

Mixed into each of vLLM's linear LoRA classes (see ``compat.install``), whose own A and B are
never made. A layer is inert until :meth:`CURLinearMixin.install_basis`; without a basis it costs
nothing. Memory of a layer besides its part of the bank: C, ``r·out`` numbers, or ``n·r·out`` where
torch takes the step, with n packed linears (q, k and v; gate and up).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.lora.layers import (
    ColumnParallelLinearWithLoRA,
    MergedColumnParallelLinearWithLoRA,
    QKVParallelLinearWithLoRA,
    RowParallelLinearWithLoRA,
)

from secura_serve.errors import UnservableError
from secura_serve.method import Basis
from secura_serve.serve import native_step
from secura_serve.serve.bank import Layout
from secura_serve.serve.step import adapter_step

__all__ = ["CURLinearMixin"]


class CURLinearMixin:
    """y' = y + C_s·(U_slot·(y_s − b_s)[rows]) for each slice s of a packed linear."""

    bank: Tensor | None = None
    """This linear's part of the bank, ``(slots + 1, *layout)``, given by the manager."""
    ranks: Tensor
    """``(slots + 1,)`` int32, given by the manager."""

    # Given by the vLLM class that this is mixed into.
    base_layer: Any
    punica_wrapper: Any
    device: torch.device
    input_size: int
    output_size: int
    n_slices: int
    tp_size: int
    tp_rank: int

    def create_lora_weights(
        self, max_loras: int, lora_config: Any, model_config: Any = None
    ) -> None:
        """Note the sizes; the memory is taken by :meth:`install_basis`."""
        self.lora_config = lora_config
        self.slots = max_loras
        if "output_slices" not in self.__dict__:
            self.output_slices: tuple[int, ...] = (self.output_size,)

    @property
    def _sharded_out(self) -> bool:
        return self.tp_size > 1 and isinstance(self, ColumnParallelLinearWithLoRA)

    @property
    def _sharded_in(self) -> bool:
        return self.tp_size > 1 and isinstance(self, RowParallelLinearWithLoRA)

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
        if self._sharded_out and isinstance(self, QKVParallelLinearWithLoRA):
            raise UnservableError("a checkpoint with fused qkv needs --tensor-parallel-size 1")
        n, r = self.n_slices, max(max(len(b.rows), len(b.cols)) if b else 0 for b in bases)
        dtype = self.lora_config.lora_dtype
        # Gathers that are spread over ranks must be summed between the op's two halves.
        self.native = not self._sharded_out and native_step.fits(self.device, dtype)
        layout = Layout(n, r)
        if self.native:
            pairs = native_step.pairs(dtype)
            lanes = -(-r // native_step.LANES) * native_step.LANES
            layout = Layout(n, -(-r // pairs) * pairs, pairs, lanes)
        n, r = layout.n, layout.r
        starts = torch.tensor([0, *accumulate(self.output_slices)])
        rows = torch.full((n, r), -1, dtype=torch.int64)
        owned = torch.zeros(n, r, dtype=dtype)
        C_t = torch.zeros(n, r, int(starts[-1]), dtype=dtype, device=self.device)
        for s, (basis, size) in enumerate(zip(bases, self.output_slices, strict=True)):
            if basis is not None:
                local, mine = self._local_rows(s, basis.rows, size)
                rows[s, : len(local)] = starts[s] + local
                owned[s, : len(local)] = mine.to(dtype)
                at = slice(int(starts[s]), int(starts[s + 1]))
                C_t[s, : len(basis.cols), at] = self._columns(basis.cols)[:, at]
        self.offset = self._bias_at(rows.clamp(min=0).flatten().to(self.device))
        if self.native:
            # Slices do not overlap, so their C lie side by side; and pairwise, for the op.
            self.C = C_t.sum(0).unflatten(0, (-1, layout.pairs)).transpose(1, 2).contiguous()
            self.rows, self.starts = rows.to(torch.int32), starts
        else:
            self.C, self.rows = C_t.flatten(0, 1), rows.clamp(min=0).flatten().to(self.device)
        self.owned = owned.flatten().to(self.device) if self._sharded_out else None
        return layout

    def _local_rows(self, s: int, rows: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """Positions of global ``rows`` in this rank's slice, and which of them it answers for."""
        if not self._sharded_out:
            return rows, torch.ones_like(rows)
        shard = self.tp_rank
        if isinstance(self, MergedColumnParallelLinearWithLoRA):
            shard = self.output_ids[s]
        mine = (rows >= shard * size) & (rows < (shard + 1) * size)
        # Ranks that hold copies of one KV head must not count its rows twice.
        copies = getattr(self.base_layer, "num_kv_head_replicas", 1) if s else 1
        if self.tp_rank % copies:
            mine = torch.zeros_like(mine)
        return torch.where(mine, rows - shard * size, 0), mine

    def _columns(self, cols: Tensor) -> Tensor:
        """Columns of W as ``(len(cols), out)``, by pushing one-hot inputs through the kernel.

        Packed, quantised and prepacked weights have no plain columns to read.
        """
        width = self.base_layer.input_size_per_partition if self._sharded_in else self.input_size
        first = self.tp_rank * width if self._sharded_in else 0
        one_hot = torch.zeros(
            len(cols), width, dtype=self.base_layer.params_dtype, device=self.device
        )
        place = cols - first
        held = ((place >= 0) & (place < width)).nonzero().squeeze(-1)
        one_hot[held.to(self.device), place[held].to(self.device)] = 1
        kernel = self._get_quant_method()  # type: ignore[attr-defined]
        columns: Tensor = kernel.apply(self.base_layer, one_hot, None)
        if self._sharded_in:
            columns = tensor_model_parallel_all_reduce(columns)
        return columns

    def _bias_at(self, rows: Tensor) -> Tensor | None:
        """The bias that the base output holds at ``rows``, so that it can be taken off again."""
        bias = getattr(self.base_layer, "bias", None)
        if bias is None or self.base_layer.skip_bias_add or (self._sharded_in and self.tp_rank):
            return None
        at_rows: Tensor = bias.detach()[rows].to(self.lora_config.lora_dtype)
        return at_rows

    def reset_lora(self, index: int) -> None:
        """Nothing: the manager empties and fills a slot of all linears at once."""

    def set_lora(self, index: int, lora_a: Any, lora_b: Any) -> None:
        """Never called: an adapter has no module of this name, see ``CURModelManager``."""
        raise AssertionError("an adapter came past the bank")

    def _reduce(self, g: Tensor) -> Tensor:
        assert self.owned is not None
        whole: Tensor = tensor_model_parallel_all_reduce(g * self.owned)
        return whole

    def _apply_lora_to_output(self, x: Tensor, output: Tensor) -> Tensor:
        if self.bank is None:
            return output
        y = output.reshape(-1, output.shape[-1])
        slots = self.punica_wrapper._token_lora_indices[: y.shape[0]]
        if self.native:
            torch.ops.secura.step_(
                y, slots, self.rows, self.bank, self.ranks, self.C, self.offset, self.starts
            )
            return y.view(output.shape)
        y = adapter_step(
            y,
            slots,
            rows=self.rows,
            bank=self.bank,
            C_t=self.C,
            offset=self.offset,
            reduce=None if self.owned is None else self._reduce,
        )
        return y.view(output.shape)
