"""``SecuraModel``: CUR adapters on a whole model, through PEFT's own entry points."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import Tensor, nn

from secura_serve.adapter import CURModule
from secura_serve.errors import ConfigError, UnservableError
from secura_serve.train.tuner.config import SecuraConfig
from secura_serve.train.tuner.folder import check_base, modules_of, take_stored
from secura_serve.train.tuner.layer import SecuraLayer
from secura_serve.train.tuner.linear import SecuraLinear

__all__ = ["SecuraModel", "adapter_layers"]


def adapter_layers(model: nn.Module, name: str) -> dict[str, SecuraLayer]:
    """Return module name -> layer, for every layer of ``model`` that carries adapter ``name``."""
    layers = (m for m in model.modules() if isinstance(m, SecuraLayer))
    return {layer.module: layer for layer in layers if name in layer.secura_alpha}


class SecuraModel(BaseTuner):
    """Replaces each target module by a :class:`SecuraLinear`.

    The name of a module is that of its tensor in the checkpoint of the ``*ForCausalLM`` model,
    without ``.weight``; it seeds the basis. What PEFT saves is this project's adapter folder.
    """

    def __init__(self, model: nn.Module, peft_config: Any, *args: Any, **kwargs: Any) -> None:
        # PeftModel passes a dict. transformers' load_adapter passes the configuration itself, then
        # copies U by its name, and reads nothing else of the file.
        self._copied_by_name = isinstance(peft_config, SecuraConfig)
        super().__init__(model, peft_config, *args, **kwargs)

    prefix = "secura_"
    tuner_layer_cls = SecuraLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def _create_and_replace(
        self,
        peft_config: SecuraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **kwargs: Any,
    ) -> None:
        from_folder = self._copied_by_name and bool(peft_config.base_fingerprint)
        if isinstance(target, SecuraLayer):
            target.update_layer(adapter_name, peft_config)
            if from_folder:
                take_stored(target, adapter_name, peft_config)
            return
        if isinstance(target, BaseTunerLayer):
            raise UnservableError(
                f"{current_key} already has an adapter of another method; merge or unload it first"
            )
        layer = SecuraLinear(target, adapter_name, current_key, peft_config)
        if from_folder:
            take_stored(layer, adapter_name, peft_config)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: SecuraConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        """Return the effective cores and indices of the layers; also set the fingerprints."""
        tensors: dict[str, Tensor] = {}
        fingerprints = {}
        for module, layer in adapter_layers(model, adapter_name).items():
            tensors |= layer.export(adapter_name).tensors(module)
            fingerprints[module] = layer.fingerprint(adapter_name)
        # PEFT calls this for the tensors, and writes the configuration right after them.
        config.base_fingerprint = fingerprints
        return tensors

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return key

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls,
        model: nn.Module,
        config: SecuraConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        """Check tensors and base, hand indices to the layers, return the cores for PEFT to copy.

        Raises:
            AdapterFormatError: a tensor is missing, unknown or damaged.
            BaseMismatchError: the adapter was trained on another base.
        """
        layers = adapter_layers(model, adapter_name)
        # Empty when the folder is loaded into an existing adapter: PEFT then keeps that adapter's
        # configuration (the Trainer resumes like this), and the basis must be the existing one.
        fingerprints = config.base_fingerprint or {
            module: layer.fingerprint(adapter_name) for module, layer in layers.items()
        }
        written = replace(config.to_adapter_config(), base_fingerprint=dict(fingerprints))
        modules = modules_of(state_dict, written)
        check_base(modules, layers, written)
        cores = {}
        paths = {m.module: path for path, m in model.named_modules() if isinstance(m, SecuraLayer)}
        for module, cur in modules.items():
            layers[module].load_core(adapter_name, cur, config)
            for part in SecuraLayer.adapter_layer_names:
                if adapter_name in (values := getattr(layers[module], part)):
                    cores[f"{paths[module]}.{part}.{adapter_name}"] = values[adapter_name].data
        return cores

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Refuse ``adapter_names``: PEFT drops it after this, and the active adapters would answer.

        Raises:
            UnservableError: each row of the batch is to have its own adapter.
        """
        if kwargs.get("adapter_names") is not None:
            raise UnservableError(
                "adapter_names (one adapter per row of a batch) is not offered in training; call "
                "set_adapter() and one forward per adapter, or serve them mixed with secura-serve"
            )
        yield

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False
    ) -> None:
        """Merge as PEFT does, but refuse before the first layer is changed.

        Raises:
            UnservableError: the adapters have no W', or their norms differ.
        """
        self._check_merge(adapter_names)
        super().merge_adapter(adapter_names, safe_merge=safe_merge)

    def _unload_and_optionally_merge(self, merge: bool = True, **kwargs: Any) -> nn.Module:
        if merge:
            self._check_merge(kwargs.get("adapter_names"))
        unloaded: nn.Module = super()._unload_and_optionally_merge(merge=merge, **kwargs)
        return unloaded

    def _check_merge(self, names: Sequence[str] | None) -> None:
        chosen = self.active_adapters if names is None else names
        self._check_known(chosen)
        for layer in (m for m in self.model.modules() if isinstance(m, SecuraLayer)):
            together = [*layer.merged_adapters, *chosen]
            if carried := [n for n in dict.fromkeys(together) if n in layer.secura_alpha]:
                layer.foldable_norm(carried)

    def _check_known(self, names: Sequence[str]) -> None:
        if unknown := [name for name in names if name not in self.peft_config]:
            known = ", ".join(self.peft_config) or "none"
            raise ConfigError(f"no adapter {', '.join(unknown)}; loaded are: {known}")

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "linear",
    ) -> None:
        """Add ``adapter_name`` with U = Σ wᵢ·Uᵢ, which is exact because C and R are shared.

        Raises:
            ConfigError: a name is unknown or taken, or ``combination_type`` is not ``linear``.
            UnservableError: bases or norms differ, or the norm takes one adapter only.
        """
        if len(adapters) != len(weights) or not adapters:
            raise UnservableError(f"{len(adapters)} adapters but {len(weights)} weights were given")
        self._check_known(adapters)
        if adapter_name in self.peft_config:
            raise ConfigError(f"adapter {adapter_name!r} exists; delete it or choose another name")
        if combination_type != "linear":
            raise ConfigError(f"combination_type: got {combination_type!r}, allowed: linear")
        first = adapters[0]
        tables = [adapter_layers(self.model, name) for name in adapters]
        for module, layer in tables[0].items():
            mine = layer.basis(first)
            for name, table in zip(adapters, tables, strict=True):
                other = table[module].basis(name) if module in table else None
                same = other is not None and all(map(torch.equal, mine, other))
                if not same or len(table) != len(tables[0]):
                    raise UnservableError(
                        f"{first} and {name} do not share a basis (first seen at {module}); "
                        "train both with the same rank, targets, selection rule and seed"
                    )
            layer.foldable_norm(list(adapters))
        config = copy.deepcopy(self.peft_config[first])
        config.core, config.inner_rank, config.alpha = "u", None, 1.0
        self.peft_config[adapter_name] = config
        for layer in tables[0].values():
            parts = [w * layer.core(n).detach() for n, w in zip(adapters, weights, strict=True)]
            exported = layer.export(first)
            mixed = CURModule(U=torch.stack(parts).sum(0), rows=exported.rows, cols=exported.cols)
            layer.load_core(adapter_name, mixed, config)
