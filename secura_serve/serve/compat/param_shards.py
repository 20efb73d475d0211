"""Where a rank holds which part of a weight of the checkpoint, found by asking vLLM's own loader.

How vLLM slices, packs and copies differs by class, rank and version. So it is not written down
here: the model loads stand-ins without memory, and each copy into a parameter is caught before it
happens. It says which part of the weight would have gone where. What comes of it is a guess until
somebody has compared the parameter with that part of the file, bit for bit. Beside it: which
weights are multiplied with as they lie.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from secura_serve.serve.compat.names import find, require

__all__ = ["ParamShard", "find_param_shards", "plain_weight"]

_OFFLOADER = "vllm.model_executor.offloader.base"


class ParamShard(NamedTuple):
    """One rank's part of a weight W ``(out, in)``."""

    held: Tensor
    """Where it lies: contiguous, in a parameter."""
    rows: slice
    cols: slice


def find_param_shards(
    model: Any, weights: Iterable[tuple[str, Tensor, bool]]
) -> dict[str, ParamShard]:
    """Return this rank's shard of each weight that lies in one piece in a plain linear, by name.

    Left out is what is quantised, offloaded, an expert's or another rank's, held in another dtype
    or by two modules (which may keep something that was made of it), cut, joined or reordered, and
    whatever the model does not load one by one.

    Args:
        weights: name and tensor as the checkpoint has them (no number of it is read), and whether
            it is W as ``(in, out)``.
    """
    plain, shards = _plain_storages(model), dict[str, ParamShard]()
    if not plain:
        return shards
    for name, tensor, transposed in weights:
        stand_in = torch.empty_like(tensor, device="meta")
        with _Copies() as caught:
            try:
                model.load_weights([(name, stand_in)])
            except Exception:
                # Of whatever kind: it wants more than this one.
                continue
        if len(caught.copies) != 1 or tensor.itemsize < 2:
            continue
        ((held, part),) = caught.copies
        slices = _slices(part, stand_in.T if transposed else stand_in)
        fits = held.dtype == tensor.dtype and held.shape == part.shape and held.is_contiguous()
        if slices and fits and held.untyped_storage().data_ptr() in plain:
            shards[name] = ParamShard(held, *slices)
    return shards


class _Copies(TorchDispatchMode):
    """Catches what would be copied from tensors without memory into others."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.copies: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default and args[1].is_meta and not args[0].is_meta:
            self.copies.append((args[0], args[1]))
            return args[0]
        return func(*args, **(kwargs or {}))


def plain_weight(layer: Any) -> Tensor | None:
    """Return the ``(out, in)`` weight of a base linear that is torch's own ``linear``, no more.

    None where it is anything else: quantised, by another kernel, in a forward of its own, or not on
    the layer's device.
    """
    linear, plain = layer.base_layer, "vllm.model_executor.layers"
    if not _is_unquantised(linear):
        return None
    method = linear.quant_method
    require("UnquantizedLinearMethod", method, ("_gemm_impl",))
    multiply = find(f"{plain}.utils:default_unquantized_gemm")
    # vLLM asks the whole module where it is a replicated one, and not this method alone.
    replicated = isinstance(linear, find(f"{plain}.linear:ReplicatedLinear"))
    if method._gemm_impl is not multiply or _batch_invariant() or replicated:
        return None
    weight = linear.weight
    if not isinstance(weight, Tensor) or weight.ndim != 2 or weight.stride(1) != 1:
        return None
    return weight if weight.device == torch.device(layer.device) else None


def _batch_invariant() -> bool:
    from vllm import envs

    return bool(envs.VLLM_BATCH_INVARIANT)


def _is_unquantised(linear: Any) -> bool:
    unquantised = find("vllm.model_executor.layers.linear:UnquantizedLinearMethod")
    return type(getattr(linear, "quant_method", None)) is unquantised


def _plain_storages(model: nn.Module) -> set[int]:
    """Return the addresses of the weights of linears that are not quantised, held once each."""
    if type(find(f"{_OFFLOADER}:get_offloader")()) is not find(f"{_OFFLOADER}:NoopOffloader"):
        # Then a parameter may be a buffer that several layers use in turn.
        return set()
    linear = find("vllm.model_executor.layers.linear:LinearBase")
    weights = [m.weight for m in model.modules() if isinstance(m, linear) and _is_unquantised(m)]
    held = model.named_parameters(remove_duplicate=False)
    holders = Counter(p.untyped_storage().data_ptr() for _, p in held)
    found = (w.untyped_storage().data_ptr() for w in weights if isinstance(w, Tensor))
    return {address for address in found if address and holders[address] == 1}


def _slices(part: Tensor, W: Tensor) -> tuple[slice, slice] | None:
    """Return the rows and columns of W that a view of it shows; None where it shows others."""
    if part.ndim != 2 or part.stride() != W.stride():
        return None
    (down, across), offset = W.stride(), int(part.storage_offset())
    first, rest = divmod(offset, max(down, across))
    row, col = (first, rest) if down >= across else (rest, first)
    rows, cols = slice(row, row + part.shape[0]), slice(col, col + part.shape[1])
    return (rows, cols) if rows.stop <= W.shape[0] and cols.stop <= W.shape[1] else None
