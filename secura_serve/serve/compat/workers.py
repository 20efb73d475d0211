"""In vLLM's workers: our layers and manager in the place of LoRA's, and what they ask of vLLM."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from secura_serve.serve.compat.names import BASE_LINEAR, LAYER, LINEARS, MANAGER, QKV, find, require

__all__ = [
    "adapters_in_slots",
    "registered_adapters",
    "resident",
    "gather_rank_errors",
    "lora_request",
    "worker_adapters",
    "apply_stock_lora",
    "base_linear",
    "check_layer",
    "check_manager",
    "check_worker",
    "install",
    "is_last_rank",
    "kv_head_copies",
    "load_stock_lora",
    "model_manager",
    "packed_modules",
    "quiet_reload",
    "registered_adapter",
    "skip_stock_lora",
    "slot_of",
    "token_slots",
    "write_slots_only",
]


def install(mixin: type, worker_manager: type) -> None:
    """Put our layers and manager in place of LoRA's, in this process; safe to call again.

    Args:
        mixin: has ``create_lora_weights``, ``set_lora``, ``reset_lora`` and what follows for
            every linear LoRA class; ``apply_adapter(x, output)`` becomes the hook after the base
            linear, and ``apply_linear(x, bias)`` what calls that linear and the hook.
        worker_manager: replaces ``LRUCacheWorkerLoRAManager``; has ``model_manager``, the class of
            its manager of slots, and ``load_adapter(lora_request)``.
    """
    utils: Any = importlib.import_module("vllm.lora.utils")
    runner: Any = importlib.import_module("vllm.v1.worker.lora_model_runner_mixin")
    if issubclass(runner.LRUCacheWorkerLoRAManager, worker_manager):
        return
    layers = importlib.import_module("vllm.lora.layers")
    hooks: Any = mixin
    ours_instead = {
        "_apply_lora_to_output": hooks.apply_adapter,
        "_apply_sync": hooks.apply_linear,
    }
    ours = {
        cls: type(f"CUR{cls.__name__}", (mixin, cls), ours_instead)
        for cls in (getattr(layers, name) for name in LINEARS)
    }
    utils._all_lora_classes = tuple(ours.get(c, c) for c in utils._all_lora_classes)
    manager: Any = worker_manager
    runner.LRUCacheWorkerLoRAManager = type(
        worker_manager.__name__,
        (worker_manager,),
        {"_manager_cls": manager.model_manager, "_load_adapter": manager.load_adapter},
    )
    _keep_cpu_compilation()


def check_manager(manager: Any) -> None:
    """Raise IncompatibleVLLMError, naming every attribute that vLLM's manager of slots lacks."""
    require("LRUCacheLoRAModelManager", manager, MANAGER)
    for wrapper in manager.punica_wrapper_mapping.values():
        require("PunicaWrapperBase", wrapper, ("_token_lora_indices", "indices_len"))
        if manager.device.type == "cuda":
            require("PunicaWrapperGPU", wrapper, ("token_mapping_meta",))
            require("LoRAKernelMeta", wrapper.token_mapping_meta, ("no_lora_flag_cpu",))


def check_layer(layer: Any) -> None:
    """Raise IncompatibleVLLMError, naming every attribute that a linear LoRA layer lacks."""
    require(type(layer).__name__, layer, LAYER)
    base = layer.base_layer
    require(type(base).__name__, base, BASE_LINEAR + QKV if _is_qkv(base) else BASE_LINEAR)


def check_worker(worker: Any) -> None:
    """Raise IncompatibleVLLMError, naming what a worker lacks that a fold needs."""
    require("Worker", worker, ("model_runner", "reload_weights", "rank", "parallel_config"))
    require("ModelRunner", worker.model_runner, ("model_config", "get_model", "device"))


def gather_rank_errors(error: str | None) -> set[str]:
    """Return the errors of all ranks of this engine; each of them has to call this."""
    every = set() if error is None else {error}
    for kind in ("tp", "pcp", "pp"):
        group = find(f"vllm.distributed.parallel_state:get_{kind}_group")()
        heard = [every] * group.world_size
        if group.world_size > 1:
            torch.distributed.all_gather_object(heard, every, group=group.cpu_group)
        every = every.union(*heard)
    return every


def is_last_rank(worker: Any) -> bool:
    """Return whether vLLM hears this worker of its engine last."""
    return bool(worker.rank == worker.parallel_config.world_size - 1)


def token_slots(wrapper: Any) -> Tensor:
    """Return the slot of every token of the batch, -1 for none, in a buffer of fixed address."""
    slots: Tensor = wrapper._token_lora_indices
    return slots


def skip_stock_lora(manager: Any) -> None:
    """Have vLLM's own LoRA kernels launch nothing for the batch that was just announced.

    By themselves they stay away only from batches without any adapter, ours included.
    """
    for wrapper in manager.punica_wrapper_mapping.values():
        wrapper.token_mapping_meta.no_lora_flag_cpu[0] = True


def write_slots_only(wrapper: Any) -> None:
    """Have vLLM's wrapper hold each token's slot and nothing else, by one copy for each batch.

    The rest of what it works out (8,192 tokens one by one, sorted twice, with a wait for the
    device) is for vLLM's own LoRA layers: use this where there are none.
    """
    buffer, written = token_slots(wrapper), 0

    def update_metadata(
        mapping: Any, lora_index_to_id: Sequence[int | None], *args: Any, **kwargs: Any
    ) -> None:
        nonlocal written
        ids, count = mapping.index_mapping, len(mapping.index_mapping)
        # Padding tokens read past the batch; what an earlier one left there would cost work.
        slots = np.full(max(count, written), -1, dtype=np.int64)
        slots[:count] = slots_of_tokens(ids, lora_index_to_id)
        written, whole = count, torch.from_numpy(slots)
        if buffer.device.type == "cuda":
            whole = whole.pin_memory()
        buffer[: len(whole)].copy_(whole, non_blocking=True)
        wrapper.indices_len[0] = count

    wrapper.update_metadata = update_metadata


def slots_of_tokens(
    ids: Sequence[int], lora_index_to_id: Sequence[int | None]
) -> npt.NDArray[np.int64]:
    """Return the slot of every token, -1 for none, from each token's ``lora_int_id`` (0 for none).

    Raises:
        KeyError: an adapter that is in no slot.
    """
    wanted = np.fromiter(ids, np.int64, len(ids))
    held = np.array([number or 0 for number in lora_index_to_id], np.int64)
    order = np.argsort(held)
    place = order[np.searchsorted(held, wanted, sorter=order).clip(max=len(held) - 1)]
    found = held[place] == wanted
    if lost := sorted({int(number) for number in wanted[~found & (wanted > 0)]}):
        raise KeyError(f"adapters {lost} are in no slot")
    return np.where(wanted > 0, place, -1)


def slot_of(manager: Any, lora_id: int) -> int:
    """Return the slot that vLLM has chosen for an adapter."""
    return int(manager.lora_index_to_id.index(lora_id))


def adapters_in_slots(manager: Any) -> Any:
    """Return vLLM's cache of the numbers that are in a slot, least recently used first."""
    return manager._active_adapters


def registered_adapters(manager: Any) -> Any:
    """Return vLLM's cache of the adapters that are ready for a slot, by number."""
    return manager._registered_adapters


def registered_adapter(manager: Any, lora_id: int) -> Any:
    """Return the LoRAModel that vLLM keeps under a number."""
    return manager._registered_adapters[lora_id]


def model_manager(worker_manager: Any) -> Any:
    """Return a worker's manager of slots."""
    return worker_manager._adapter_manager


def worker_adapters(model_runner: Any) -> Any:
    """Return a worker's manager of adapters.

    Raises:
        IncompatibleVLLMError: this worker has none.
    """
    require("ModelRunner", model_runner, ("lora_manager",))
    return model_runner.lora_manager


def lora_request(name: str, number: int, path: str) -> Any:
    """Return vLLM's ``LoRARequest`` for a name, a number above 0 and a folder."""
    from vllm.lora.request import LoRARequest

    return LoRARequest(lora_name=name, lora_int_id=number, lora_path=path)


def resident(worker_manager: Any) -> list[int]:
    """Return the numbers of the adapters that are in a slot."""
    slots = model_manager(worker_manager).lora_index_to_id
    return [int(number) for number in slots if number is not None]


def load_stock_lora(worker_manager: Any, lora_request: Any) -> Any:
    """Return a plain LoRA as vLLM itself reads it."""
    stock = find("vllm.lora.worker_manager:LRUCacheWorkerLoRAManager")
    return stock._load_adapter(worker_manager, lora_request)


def apply_stock_lora(layer: Any, x: Tensor, y: Tensor) -> Tensor:
    """Return y with vLLM's own LoRA step applied."""
    adapted: Tensor = _stock_layer()._apply_lora_to_output(layer, x, y)
    return adapted


@cache
def _stock_layer() -> Any:
    return find("vllm.lora.layers.base_linear:BaseLinearLayerWithLoRA")


def base_linear(layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return W x, and the bias if it is given, by the base linear's own kernel."""
    y: Tensor = layer._get_quant_method().apply(layer.base_layer, x, bias)
    return y


def kv_head_copies(layer: Any, s: int) -> int:
    """Return how many ranks hold the same rows of slice ``s``; more than 1 for copied KV heads."""
    return int(layer.base_layer.num_kv_head_replicas) if s and _is_qkv(layer.base_layer) else 1


def _is_qkv(linear: Any) -> bool:
    # Not every linear of this kind derives from QKVParallelLinear; all are called so.
    return any("QKV" in cls.__name__ for cls in type(linear).__mro__)


def packed_modules(model: Any) -> dict[str, list[str]]:
    """Return which linears vLLM keeps as one, such as ``{"qkv_proj": ["q_proj", ...]}``; a model
    that packs none does not say so."""
    return dict(getattr(model, "packed_modules_mapping", None) or {})


def _keep_cpu_compilation() -> None:
    """Let the CPU platform choose its compilation as it would without adapters.

    It turns compilation off for stock LoRA, whose kernels cannot be traced; our adapter step is
    a plain tensor expression.
    """
    platform = find("vllm.platforms.cpu:CpuPlatform")
    original: Callable[..., None] = platform.check_and_update_config.__func__

    def check_and_update_config(cls: type, vllm_config: Any) -> None:
        lora, vllm_config.lora_config = vllm_config.lora_config, None
        try:
            original(cls, vllm_config)
        finally:
            vllm_config.lora_config = lora

    platform.check_and_update_config = classmethod(check_and_update_config)


@contextmanager
def quiet_reload() -> Iterator[None]:
    """Silence the warnings that vLLM's reload gives for every linear that is not in the stream."""
    loggers = [
        logging.getLogger(f"vllm.model_executor.model_loader.reload.{name}")
        for name in ("layerwise", "inplace")
    ]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
