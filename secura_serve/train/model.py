"""``SecuraModel``: CUR adapters on a whole model, through PEFT's own entry points."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import Tensor, nn

from secura_serve.adapter import CURModule, fingerprint, mismatch
from secura_serve.adapter.format import module_problems
from secura_serve.errors import (
    AdapterFormatError,
    BaseMismatchError,
    ConfigError,
    UnservableError,
)
from secura_serve.train.config import SecuraConfig
from secura_serve.train.layer import SecuraLayer
from secura_serve.train.linear import SecuraLinear
from secura_serve.train.peft_type import extend_peft_type, register

__all__ = [
    "SecuraConfig",
    "SecuraLayer",
    "SecuraLinear",
    "SecuraModel",
    "adapter_layers",
    "extend_peft_type",
]

_KEY = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.secura_(?P<field>U|rows|cols|rho_max)")


def adapter_layers(model: nn.Module, name: str) -> dict[str, SecuraLayer]:
    """Module name -> layer, for every layer of ``model`` that carries adapter ``name``."""
    layers = (m for m in model.modules() if isinstance(m, SecuraLayer))
    return {layer.module: layer for layer in layers if name in layer.secura_alpha}


class SecuraModel(BaseTuner):
    """Puts :class:`SecuraLinear` in the place of each target module.

    A module is named as its tensor in the checkpoint, without ``.weight``, in the ``*ForCausalLM``
    tree: the name seeds its basis. What PEFT saves is this project's adapter folder.
    """

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
        if isinstance(target, SecuraLayer):
            target.update_layer(adapter_name, peft_config)
            return
        if isinstance(target, BaseTunerLayer):
            raise UnservableError(
                f"{current_key} already carries another kind of adapter; merge or unload it first"
            )
        layer = SecuraLinear(target, adapter_name, current_key, peft_config)
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
        """The effective cores and indices from the layers; also fills in the fingerprint."""
        tensors: dict[str, Tensor] = {}
        prints = {}
        for module, layer in adapter_layers(model, adapter_name).items():
            tensors |= layer.export(adapter_name).tensors(module)
            prints[module] = fingerprint(layer.pristine, layer.basis(adapter_name))
        # PEFT writes the configuration right after the tensors that it asks for here.
        config.base_fingerprint = prints
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
        fields: dict[str, dict[str, Tensor]] = {}
        problems = []
        for key, tensor in state_dict.items():
            match = _KEY.fullmatch(key)
            if match is None:
                problems.append(f"tensor {key!r} is not part of the format")
            else:
                fields.setdefault(match["module"], {})[match["field"]] = tensor.cpu()
        layers, written = adapter_layers(model, adapter_name), config.to_adapter_config()
        modules: dict[str, CURModule] = {}
        for module, named in fields.items():
            if not {"U", "rows", "cols"} <= set(named):
                problems.append(f"{module}: U, rows and cols must all be there")
                continue
            peak = named.get("rho_max")
            cur = CURModule(
                named["U"], named["rows"], named["cols"], None if peak is None else float(peak)
            )
            problems += module_problems(module, cur, written)
            modules[module] = cur
        if problems:
            raise AdapterFormatError("the adapter is not valid:", problems)
        _check_base(modules, layers, config)
        cores = {}
        paths = {m.module: path for path, m in model.named_modules() if isinstance(m, SecuraLayer)}
        for module, cur in modules.items():
            layers[module].load_core(adapter_name, cur, config.norm)
            cores[f"{paths[module]}.secura_U.{adapter_name}"] = cur.U.to(torch.float32)
        return cores

    def training_state(self, adapter_name: str) -> dict[str, Tensor]:
        """All layers' :meth:`SecuraLayer.training_state`, keyed ``<module>.<what>``."""
        return {
            f"{module}.{what}": value
            for module, layer in adapter_layers(self.model, adapter_name).items()
            for what, value in layer.training_state(adapter_name).items()
        }

    def load_training_state(self, adapter_name: str, state: Mapping[str, Tensor]) -> None:
        """Put back what :meth:`training_state` gave, into the same parameters, bit for bit.

        Raises:
            ConfigError: the state is of other modules, or of another core or rank.
        """
        layers = adapter_layers(self.model, adapter_name)
        parts: dict[str, dict[str, Tensor]] = {module: {} for module in layers}
        for key, value in state.items():
            module, _, what = key.rpartition(".")
            if module not in parts:
                raise ConfigError(f"{module}: the state is of a module without {adapter_name!r}")
            parts[module][what] = value
        for module, layer in layers.items():
            layer.load_training_state(adapter_name, parts[module])

    def add_weighted_adapter(
        self, adapters: Sequence[str], weights: Sequence[float], adapter_name: str
    ) -> None:
        """Add ``adapter_name`` with U = Σ wᵢ·Uᵢ: exact, because C and R are shared.

        Raises:
            UnservableError: bases or norms differ, or the norm takes one adapter only.
        """
        if len(adapters) != len(weights) or not adapters:
            raise UnservableError(f"{len(adapters)} adapters but {len(weights)} weights were given")
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
            layer.load_core(adapter_name, mixed, config.norm)


def _check_base(
    modules: dict[str, CURModule], layers: dict[str, SecuraLayer], config: SecuraConfig
) -> None:
    """Compare fingerprints before anything is changed."""
    problems = [f"{m}: the base has no such target" for m in modules if m not in layers]
    problems += [f"{m}: targeted, but not in the file" for m in layers if m not in modules]
    for module, cur in modules.items():
        if module not in layers:
            continue
        claimed = config.base_fingerprint.get(module)
        if reason := mismatch(layers[module].pristine, cur.basis, claimed):
            problems.append(f"{module}: {reason}")
    if problems:
        more = f" (and {len(problems) - 1} more modules)" if len(problems) > 1 else ""
        raise BaseMismatchError(
            f"the adapter was trained on another base ({config.base_model_name_or_path}): "
            f"{problems[0]}{more}. Load it on that base, or train it again on this one"
        )


register(SecuraConfig, SecuraModel)
