"""The CUR half of vLLM's linear LoRA layers: slots of U, the shared C, and the adapter step.

Mixed into each of vLLM's linear LoRA classes (see ``compat.install``), whose own A and B are
never made. A layer is inert until :meth:`CURLinearMixin.install_basis`; without a basis it costs
nothing. Memory of a layer: ``(slots + 1)·n·r²`` for the bank and ``n·r·out`` for C, with n packed
linears (q, k and v; gate and up).
"""

from __future__ import annotations

from collections.abc import Sequence
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
from secura_serve.serve.step import adapter_step

__all__ = ["CURLinearMixin"]


class CURLinearMixin:
    """y' = y + C_s·(U_slot·(y_s − b_s)[rows]) for each slice s of a packed linear."""

    bank: Tensor | None = None
    """``(slots + 1, n, r, r)``; the last slot stays zero, for tokens without an adapter."""

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
    def install_basis(self, bases: Sequence[Basis | None]) -> None:
        """Take the memory and gather C, once, in the same order on every rank.

        Args:
            bases: one per slice, indices into that slice's whole (unsharded) W; None where no
                adapter touches it.
        """
        if all(basis is None for basis in bases):
            return
        if len(bases) != self.n_slices:
            raise UnservableError(f"{len(bases)} modules for a linear of {self.n_slices} slices")
        if self._sharded_out and isinstance(self, QKVParallelLinearWithLoRA):
            raise UnservableError("a checkpoint with fused qkv needs --tensor-parallel-size 1")
        widths = [max(len(b.rows), len(b.cols)) if b else 0 for b in bases]
        n, r, out = self.n_slices, max(widths), sum(self.output_slices)
        dtype = self.lora_config.lora_dtype
        self.bank = torch.zeros(self.slots + 1, n, r, r, dtype=dtype, device=self.device)
        self.C_t = torch.zeros(n * r, out, dtype=dtype, device=self.device)
        self.rows = torch.zeros(n * r, dtype=torch.int64, device=self.device)
        owned = torch.zeros(n * r, dtype=dtype, device=self.device)
        start = 0
        for s, (basis, size) in enumerate(zip(bases, self.output_slices, strict=True)):
            if basis is not None:
                local, mine = self._local_rows(s, basis.rows, size)
                at = slice(s * r, s * r + len(basis.rows))
                self.rows[at] = start + local.to(self.device)
                owned[at] = mine.to(self.device, dtype)
                C_t = self._columns(basis.cols)[:, start : start + size]
                self.C_t[s * r : s * r + len(basis.cols), start : start + size] = C_t
            start += size
        self.offset = self._bias_at_rows()
        self.owned = owned if self._sharded_out else None

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

    def _bias_at_rows(self) -> Tensor | None:
        """The bias that the base output holds at ``rows``, so that it can be taken off again."""
        bias = getattr(self.base_layer, "bias", None)
        if bias is None or self.base_layer.skip_bias_add or (self._sharded_in and self.tp_rank):
            return None
        at_rows: Tensor = bias.detach()[self.rows].to(self.lora_config.lora_dtype)
        return at_rows

    def reset_lora(self, index: int) -> None:
        """Empty a slot."""
        if self.bank is not None:
            self.bank[index].zero_()

    def set_lora(self, index: int, lora_a: Any, lora_b: Any) -> None:
        """Put an adapter's U (one per slice, embedded in the basis) into a slot: one copy."""
        self.reset_lora(index)
        cores = [lora_a] if isinstance(lora_a, Tensor) else lora_a
        for s, U in enumerate(cores):
            if U is not None:
                if self.bank is None:
                    raise UnservableError("an adapter for a layer that has no basis")
                self.bank[index, s, : U.shape[0], : U.shape[1]].copy_(U, non_blocking=True)

    def _reduce(self, g: Tensor) -> Tensor:
        assert self.owned is not None
        whole: Tensor = tensor_model_parallel_all_reduce(g * self.owned)
        return whole

    def _apply_lora_to_output(self, x: Tensor, output: Tensor) -> Tensor:
        if self.bank is None:
            return output
        y = output.reshape(-1, output.shape[-1])
        y = adapter_step(
            y,
            self.punica_wrapper._token_lora_indices[: y.shape[0]],
            rows=self.rows,
            bank=self.bank,
            C_t=self.C_t,
            offset=self.offset,
            reduce=None if self.owned is None else self._reduce,
        )
        return y.view(output.shape)
