"""Adapter slots: vLLM's LRU of adapters, filled from SECURA folders.

vLLM's requests, scheduling, LRU and prefix-cache keys stay as they are; only what an adapter *is*
changes: one row of the :class:`Bank`, read from a folder and copied into a slot.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from vllm.logger import init_logger
from vllm.lora.lora_model import LoRAModel
from vllm.lora.lora_weights import LoRALayerWeights
from vllm.lora.model_manager import LRUCacheLoRAModelManager
from vllm.lora.utils import parse_fine_tuned_lora_name
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

from secura_serve import adapter as adapters
from secura_serve.bases import cache_root
from secura_serve.checkpoint import Checkpoint
from secura_serve.errors import UnservableError
from secura_serve.serve import compat
from secura_serve.serve.basis import SharedBasis, base_id, refuse_full_rank
from secura_serve.serve.engine.bank import Bank
from secura_serve.serve.engine.batch_flags import CUR, DELTA, KINDS, LORA, BatchFlags
from secura_serve.serve.engine.deltas import DeltaModel, ResidentDeltas
from secura_serve.serve.engine.gated import take_activations
from secura_serve.serve.engine.layers import CURLinearMixin
from secura_serve.serve.engine.mixing import KeptRow, check_mix, mixed_row
from secura_serve.serve.engine.mmap_tensors import map_tensors
from secura_serve.serve.mix_path import is_mix_path, split_mix_path
from secura_serve.serve.names import CONFIG_KEY

# A child of vLLM's logger, which alone has a handler in a worker.
logger = init_logger("vllm.secura_serve")

__all__ = ["CURModelManager", "CURWorkerManager"]

_CORE = "secura.core"


def _vllm_name(model: Any, module: str) -> str:
    """Return the checkpoint's module name as vLLM's model calls it."""
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    if mapper is not None:
        mapper = mapper.get_rename_mapper()
    name, _ = parse_fine_tuned_lora_name(f"base_model.model.{module}.lora_A.weight", mapper)
    return str(name)


class CURModelManager(LRUCacheLoRAModelManager):
    """Installs the shared basis in module order, which is equal on every rank."""

    def __init__(self, model: Any, *args: Any, vllm_config: Any, **kwargs: Any) -> None:
        ours, slots = vllm_config.additional_config[CONFIG_KEY], vllm_config.lora_config.max_loras
        self.loads = self.evictions = 0
        self.pinned: set[int] = set()
        """The adapters that leave a slot only if a batch needs every other one."""
        self.in_batch: frozenset[int] = frozenset()
        """The adapters of the step that is being prepared, which must not leave theirs."""
        self.flags = BatchFlags()
        self.lora: torch.Tensor | None = None
        if ours["plain_lora"]:
            self.lora = torch.zeros(slots + 1, dtype=torch.bool)
        super().__init__(model, *args, vllm_config=vllm_config, **kwargs)
        compat.check_manager(self)
        self.shared_basis = SharedBasis.load(ours["basis"])
        ours_alone = self.lora is None and all(
            isinstance(layer, CURLinearMixin) for layer in self.modules.values()
        )
        for wrapper in self.punica_wrapper_mapping.values():
            # Padding tokens read past what vLLM writes; -1 is the empty slot.
            compat.token_slots(wrapper).fill_(-1)
            if ours_alone:
                compat.write_slots_only(wrapper)
        wanted = {_vllm_name(model, m): basis for m, basis in self.shared_basis.modules.items()}
        layers, places = [], []
        self.deltas = ResidentDeltas(ours.get("resident"), slots, self.device, self.flags[DELTA])
        resident = {_vllm_name(model, m): m for m in self.deltas.modules}
        for name, layer in self.modules.items():
            if isinstance(layer, CURLinearMixin):
                compat.check_layer(layer)
                layer.lora = self.lora
                parts = self.packed_modules.get(name, [name])
                self.deltas.install(layer, [resident.pop(part, None) for part in parts])
                bases = [wanted.pop(part, None) for part in parts]
                if (layout := layer.install_basis(bases)) is not None:
                    names = [p if b else None for p, b in zip(parts, bases, strict=True)]
                    layers.append(layer)
                    places.append((names, layout))
        self.bank = Bank(self.lora_slots, places, self.lora_config.lora_dtype, self.device)
        for i, layer in enumerate(layers):
            layer.bank, layer.ranks = self.bank.part(i), self.bank.ranks
            layer.active = self.flags[CUR]
        # A quantised base may quantise in its activation, which it then has to do itself.
        plain = vllm_config.quant_config is None
        taken = take_activations(model, self.modules) if plain else 0
        if layers:
            beside = sum(layer.begins_beside for layer in layers)
            logger.info(
                "adapters: %d slots, %s kernel; of %d steps %d are taken in the activation that "
                "follows, and %d begin beside their linear",
                *(self.lora_slots, layers[0].kernel.name, len(layers), taken, beside),
            )
        if missing := [*wanted, *resident]:
            raise UnservableError(
                f"adapters change {len(missing)} modules that {type(model).__name__} does not "
                f"offer as adapter targets, for instance {missing[0]}"
            )

    def create_dummy_lora(
        self, lora_id: int, rank: int, embedding_modules: Any = None
    ) -> LoRAModel:
        """Return an adapter that changes nothing: warm-up runs the step with an empty slot."""
        return _packed(lora_id, rank, torch.zeros(1), 0)

    def activate_adapter(self, lora_id: int) -> bool:
        """Fill the slot that vLLM has chosen, by one copy."""
        full = None not in self.lora_index_to_id
        if full and lora_id not in compat.adapters_in_slots(self):
            self._remove_one(compat.adapters_in_slots(self))
        if not super().activate_adapter(lora_id):
            return False
        slot = compat.slot_of(self, lora_id)
        model = compat.registered_adapter(self, lora_id)
        core = model.loras.get(_CORE)
        self.deltas.places[slot] = model.place if isinstance(model, DeltaModel) else -1
        if core is not None and core.rank:
            self.bank.put(slot, core.lora_a, core.rank)
        else:
            self.bank.clear(slot)
        if self.lora is not None:
            self.lora[slot] = core is None and not isinstance(model, DeltaModel)
        # Adapters of rank 0 are those of vLLM's warm-up.
        if core is None or core.rank:
            self.loads += 1
            self.evictions += full
        return True

    def kinds_of(self, lora_id: int) -> tuple[str, ...]:
        """Return which kinds of steps an adapter's tokens need."""
        model = compat.registered_adapter(self, lora_id)
        if isinstance(model, DeltaModel):
            return (DELTA,)
        core = model.loras.get(_CORE)
        if core is None:
            return (LORA,)
        # vLLM captures one CUDA graph for all adapters, with those of its warm-up, of rank 0.
        return (CUR,) if core.rank else KINDS

    def remove_oldest_adapter(self) -> bool:
        """Forget one adapter, so that another can be registered."""
        return self._remove_one(compat.registered_adapters(self))

    def _remove_one(self, held: Any) -> bool:
        """Take the least recently used adapter out of one of vLLM's caches.

        vLLM's own pins are not used: its scheduler does not know that they take slots away, and a
        batch with as many adapters as there are slots would end the engine.
        """
        oldest_first = list(held.order)
        if not oldest_first:
            return False
        free = [n for n in oldest_first if n not in self.in_batch]
        held.pop(next((n for n in free if n not in self.pinned), (free or oldest_first)[0]))
        return True


def _packed(lora_id: int, rank: int, row: torch.Tensor, used: int) -> LoRAModel:
    """Wrap a row of the bank as vLLM's idea of an adapter, under a module that no model has."""
    core = LoRALayerWeights(_CORE, used, 1, row, torch.zeros(1), scaling=1)
    return LoRAModel(lora_id, rank, {_CORE: core})


class CURWorkerManager(LRUCacheWorkerLoRAManager):
    """Reads SECURA folders for the engine.

    A folder is read once, when its adapter is registered: there an error fails that call alone.
    Whenever vLLM asks for the adapter again, in the middle of a batch, it is made from what was
    kept of it (:mod:`secura_serve.serve.engine.mmap_tensors`).
    """

    model_manager = CURModelManager

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(vllm_config, *args, **kwargs)
        self._base_path = vllm_config.additional_config[CONFIG_KEY]["base"]
        # By path, which names the content: see SnapshotStore.
        self._kept: dict[str, Callable[[int], LoRAModel]] = {}
        self._rows: dict[str, KeptRow] = {}

    def set_active_adapters(self, requests: Any, mapping: Any) -> None:
        """Put the adapters of a batch into slots."""
        manager = compat.model_manager(self)
        manager.in_batch = frozenset(request.lora_int_id for request in requests if request)
        super().set_active_adapters(requests, mapping)
        manager.flags.set(kind for n in manager.in_batch for kind in manager.kinds_of(n))
        plain = manager.lora is not None and manager.device.type == "cuda"
        if plain and not manager.flags[LORA]:
            compat.skip_stock_lora(manager)

    def load_adapter(self, lora_request: Any) -> LoRAModel:
        """Return the adapter of a registered path, or register it. Raises AdapterError."""
        path = lora_request.lora_path
        self.keep(lora_request.lora_name, path)
        return self._kept[path](lora_request.lora_int_id)

    def keep(
        self, name: str, path: str, norm_bounds: Mapping[str, Mapping[str, float]] | None = None
    ) -> None:
        """Read an adapter's folder, unless that was done before.

        Args:
            norm_bounds: see :meth:`AdapterCalls.secura_prepare`.

        Raises:
            AdapterError: this engine cannot serve it.
        """
        if path not in self._kept and is_mix_path(path):
            self._kept[path] = self._mix(path)
        elif path not in self._kept:
            plain = adapters.is_plain_lora(Path(path))
            self._kept[path] = (
                self._read_lora(name, path) if plain else self._read(Path(path), norm_bounds or {})
            )

    def keep_delta(self, path: str, place: int) -> None:
        """Have the adapter of a delta image stand for the update in a place."""
        self._kept[path] = partial(DeltaModel, place=place)

    def drop(self, path: str) -> None:
        """Forget what was kept of an adapter."""
        self._kept.pop(path, None)
        self._rows.pop(path, None)

    def _read(
        self, path: Path, norm_bounds: Mapping[str, Mapping[str, float]]
    ) -> Callable[[int], LoRAModel]:
        """Make a row of the bank from a folder."""
        manager = compat.model_manager(self)
        adapter = adapters.load(path)
        refuse_full_rank(adapter)
        identity = base_id(adapter)
        known = manager.shared_basis.verified.get(identity) or norm_bounds.get(identity)
        if known is None:
            # Loaded while the server runs: the server has not compared it with the base yet.
            compared = adapters.compare_with_base(adapter, Checkpoint(self._base_path))
            adapters.refuse_mismatches(adapter, compared.mismatches)
            known = compared.norm_bounds
        adapters.refuse_oversized(adapter, known)
        cores = {
            _vllm_name(manager.model, module): manager.shared_basis.to_shared_basis(module, cur)
            for module, cur in adapter.modules.items()
        }
        row, used = manager.bank.pack(cores)
        (row,) = map_tensors([row], _kept_in())
        sizes = adapters.update_sizes(adapter, known)
        self._rows[str(path)] = KeptRow(row, used, adapter.config.r, sizes)
        return partial(_packed, rank=adapter.config.r, row=row, used=used)

    def _mix(self, path: str) -> Callable[[int], LoRAModel]:
        """Make a mix of the rows of its parts, which it holds on to; it keeps no row itself."""
        parts = []
        for part, weight in split_mix_path(path):
            if part not in self._rows:
                raise UnservableError(f"{part} is no CUR adapter that this worker keeps")
            parts.append((self._rows[part], weight))
        check_mix(parts)
        rank, used = max(k.rank for k, _ in parts), max(k.used for k, _ in parts)
        return lambda lora_id: _packed(lora_id, rank, mixed_row(parts), used)

    def _read_lora(self, name: str, path: str) -> Callable[[int], LoRAModel]:
        """Read a plain LoRA as vLLM does, its scale multiplied in."""
        if compat.model_manager(self).lora is None:
            raise UnservableError(
                f"{name} is a plain LoRA, and this server has no room for one: "
                "restart it with such an adapter in its folder"
            )
        model = compat.load_stock_lora(self, compat.lora_request(name, 1, path))
        layers = {name: layer.optimize() for name, layer in model.loras.items()}
        kept = map_tensors([t for v in layers.values() for t in (v.lora_a, v.lora_b)], _kept_in())
        parts = [
            (name, layer.rank, layer.lora_alpha, *pair)
            for (name, layer), pair in zip(
                layers.items(), zip(kept[::2], kept[1::2], strict=True), strict=True
            )
        ]

        def rebuild(adapter_id: int) -> LoRAModel:
            return LoRAModel(
                adapter_id,
                model.rank,
                {part[0]: LoRALayerWeights(*part, scaling=1) for part in parts},
            )

        return rebuild


def _kept_in() -> Path:
    return cache_root() / "serve" / "mapped"
