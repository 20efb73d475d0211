"""Checks of what PEFT has read from an adapter folder, before a layer takes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from secura_serve.adapter import (
    AdapterConfig,
    CURModule,
    compare_modules,
    gather_verified,
    mismatch_message,
    parse_modules,
)
from secura_serve.errors import AdapterFormatError, BaseMismatchError, UnservableError
from secura_serve.method import CALIBRATED
from secura_serve.train.tuner.config import SecuraConfig
from secura_serve.train.tuner.layer import SecuraLayer

__all__ = ["check_base", "modules_of", "take_stored"]


def modules_of(tensors: Mapping[str, Tensor], written: AdapterConfig) -> dict[str, CURModule]:
    """Return the entries of ``adapter_model.safetensors`` by module.

    Raises:
        AdapterFormatError: a tensor is missing, unknown or damaged.
    """
    modules, problems = parse_modules(tensors.items(), written, prefixed=False)
    if problems:
        raise AdapterFormatError("the adapter is not valid:", problems)
    return modules


def check_base(
    modules: dict[str, CURModule], layers: dict[str, SecuraLayer], written: AdapterConfig
) -> None:
    """Compare targets and fingerprints with the base under the layers.

    Raises:
        BaseMismatchError: the adapter was trained on another base.
    """
    problems = compare_modules(modules, written.base_fingerprint, _Pristine(layers)).mismatches
    problems += [f"{m}: targeted, but not in the file" for m in layers if m not in modules]
    if problems:
        trained_on = written.base_model_name_or_path
        raise BaseMismatchError(mismatch_message("the adapter", trained_on, problems, "Load it on"))


@dataclass(frozen=True)
class _Pristine:
    """The weights under the layers, by module."""

    layers: Mapping[str, SecuraLayer]

    def shape(self, module: str) -> tuple[int, int]:
        rows, cols = self.layers[module].pristine.shape
        return rows, cols

    def weight(self, module: str) -> Tensor:
        return self.layers[module].pristine


def take_stored(layer: SecuraLayer, name: str, config: SecuraConfig) -> None:
    """Prepare ``layer`` for a U that transformers copies from a folder, with s = 1.

    The indices are computed from W by the selection rule; of a calibrated adapter they are those
    that ``SecuraConfig.from_pretrained`` read from the folder. The fingerprint covers indices and
    weights, so comparing it proves that both are those of the file's base.

    Raises:
        BaseMismatchError: the fingerprint differs.
        UnservableError: the adapter is to be trained, which needs more than U, or its indices are
            unknown.
    """
    if not config.inference_mode:
        raise UnservableError(
            "load_adapter(is_trainable=True) takes only U, not what training goes on from; use "
            "PeftModel.from_pretrained(model, folder, is_trainable=True)"
        )
    expected = config.base_fingerprint.get(layer.module)
    if config.stored_bases is None and config.rule_and_seed[0] == CALIBRATED:
        raise UnservableError(
            "load_adapter copies U alone, and the rows and columns of a calibrated adapter are in "
            "its folder: use model.load_adapter(folder, "
            "peft_config=SecuraConfig.from_pretrained(folder)), or "
            "PeftModel.from_pretrained(model, folder)"
        )
    stored = (config.stored_bases or {}).get(layer.module)
    basis = layer.basis(name) if stored is None else stored
    _, problem = gather_verified(layer.pristine, basis, expected)
    if problem is not None:
        raise BaseMismatchError(
            f"{layer.module}: the adapter was trained on another base "
            f"({config.base_model_name_or_path}), or with indices that its selection does not "
            "give; PeftModel.from_pretrained(model, folder) reads the indices and says which"
        )
    none = torch.zeros(config.r, config.r)
    layer.load_core(name, CURModule(none, *basis), config)
