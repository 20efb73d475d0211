"""Adapter slots: vLLM's LRU of adapters, filled from SECURA folders.

vLLM's requests, scheduling, LRU and prefix-cache keys stay as they are; only what an adapter *is*
changes: one row of the :class:`Bank`, read from a folder and copied into a slot.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from vllm.logger import init_logger
from vllm.lora.lora_model import LoRAModel
from vllm.lora.lora_weights import LoRALayerWeights
from vllm.lora.model_manager import LRUCacheLoRAModelManager
from vllm.lora.utils import get_adapter_absolute_path, parse_fine_tuned_lora_name
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

from secura_serve import adapter as adapters
from secura_serve.checkpoint import Checkpoint
from secura_serve.errors import UnservableError
from secura_serve.serve.bank import Bank
from secura_serve.serve.basis import SharedBasis, base_id
from secura_serve.serve.catalog import refuse_full_rank
from secura_serve.serve.layers import CURLinearMixin

# A child of vLLM's logger, which alone has a handler in a worker.
logger = init_logger("vllm.secura_serve")

__all__ = ["CONFIG_KEY", "CURModelManager", "CURWorkerManager"]

CONFIG_KEY = "secura"
"""Under ``additional_config``: ``{"basis": path, "base": folder, "plain_lora": bool}``."""
_CORE = "secura.core"


def _vllm_name(model: Any, module: str) -> str:
    """The checkpoint's module name as vLLM's model calls it."""
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    if mapper is not None:
        mapper = mapper.get_rename_mapper()
    name, _ = parse_fine_tuned_lora_name(f"base_model.model.{module}.lora_A.weight", mapper)
    return str(name)


class CURModelManager(LRUCacheLoRAModelManager):
    """Installs the shared basis in module order, which is equal on every rank."""

    def __init__(self, model: Any, *args: Any, vllm_config: Any, **kwargs: Any) -> None:
        ours, slots = vllm_config.additional_config[CONFIG_KEY], vllm_config.lora_config.max_loras
        self.lora: torch.Tensor | None = None
        if ours["plain_lora"]:
            self.lora = torch.zeros(slots + 1, dtype=torch.bool)
        # vLLM makes the layers, and with them LoRA's buffers, in its own constructor.
        CURLinearMixin.lora = self.lora
        super().__init__(model, *args, vllm_config=vllm_config, **kwargs)
        self.shared_basis = SharedBasis.load(ours["basis"])
        for wrapper in self.punica_wrapper_mapping.values():
            # Padding tokens read past what vLLM writes; -1 is the empty slot.
            wrapper._token_lora_indices.fill_(-1)
        wanted = {_vllm_name(model, m): basis for m, basis in self.shared_basis.modules.items()}
        layers, places = [], []
        for name, layer in self.modules.items():
            if isinstance(layer, CURLinearMixin):
                parts = self.packed_modules.get(name, [name])
                bases = [wanted.pop(part, None) for part in parts]
                if (layout := layer.install_basis(bases)) is not None:
                    names = [p if b else None for p, b in zip(parts, bases, strict=True)]
                    layers.append(layer)
                    places.append((names, layout))
        self.bank = Bank(self.lora_slots, places, self.lora_config.lora_dtype, self.device)
        if layers:
            kernel = type(layers[0].kernel).__name__.lower()
            logger.info("adapters: %d slots, %s kernel", self.lora_slots, kernel)
        for i, layer in enumerate(layers):
            layer.bank, layer.ranks = self.bank.part(i), self.bank.ranks
        if wanted:
            raise UnservableError(
                f"adapters change {len(wanted)} modules that {type(model).__name__} does not "
                f"offer as adapter targets, for instance {next(iter(wanted))}"
            )

    def create_dummy_lora(
        self, lora_id: int, rank: int, embedding_modules: Any = None
    ) -> LoRAModel:
        """An adapter that changes nothing: warm-up runs the same step with an empty slot."""
        return _packed(lora_id, rank, torch.zeros(1), 0)

    def activate_adapter(self, lora_id: int) -> bool:
        """vLLM chooses the slot; what goes into it is one copy."""
        if not super().activate_adapter(lora_id):
            return False
        slot = self.lora_index_to_id.index(lora_id)
        core = self._registered_adapters[lora_id].loras.get(_CORE)
        if core is not None and core.rank:
            self.bank.put(slot, core.lora_a, core.rank)
        else:
            self.bank.clear(slot)
        if self.lora is not None:
            self.lora[slot] = core is None
        return True


def _packed(lora_id: int, rank: int, row: torch.Tensor, used: int) -> LoRAModel:
    """vLLM's idea of an adapter with a row of the bank inside, as a module that no model has."""
    core = LoRALayerWeights(_CORE, used, 1, row, torch.zeros(1), scaling=1)
    return LoRAModel(lora_id, rank, {_CORE: core})


class CURWorkerManager(LRUCacheWorkerLoRAManager):
    """Reads SECURA folders for the engine."""

    _manager_cls = CURModelManager

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(vllm_config, *args, **kwargs)
        self._base_path = vllm_config.additional_config[CONFIG_KEY]["base"]

    def _load_adapter(self, lora_request: Any) -> LoRAModel:
        """Folder -> a row of the bank; a plain LoRA as vLLM reads it. Raises AdapterError."""
        manager = self._adapter_manager
        path = Path(get_adapter_absolute_path(lora_request.lora_path))
        if adapters.is_plain_lora(path):
            if manager.lora is None:
                raise UnservableError(
                    f"{path.name} is a plain LoRA, and this server has no room for one: restart "
                    "it with such an adapter in its folder"
                )
            return super()._load_adapter(lora_request)
        found = adapters.load(path)
        refuse_full_rank(found)
        gains = manager.shared_basis.verified.get(base_id(found))
        if gains is None:
            # Loaded while the server runs: the server has not compared it with the base yet.
            compared = adapters.compare_with_base(found, Checkpoint(self._base_path))
            adapters.refuse_mismatches(found, compared.mismatches)
            gains = compared.norm_bounds
        adapters.refuse_oversized(found, gains)
        cores = {
            _vllm_name(manager.model, module): manager.shared_basis.embed(module, cur)
            for module, cur in found.modules.items()
        }
        row, used = manager.bank.pack(cores)
        return _packed(lora_request.lora_int_id, found.config.r, row, used)
