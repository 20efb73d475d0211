"""Checks of what PEFT has read from an adapter folder, before a layer takes it."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from secura_serve.adapter import AdapterConfig, CURModule, fingerprint, mismatch
from secura_serve.adapter.format import module_problems
from secura_serve.errors import AdapterFormatError, BaseMismatchError, UnservableError
from secura_serve.train.tuner.config import SecuraConfig
from secura_serve.train.tuner.layer import SecuraLayer

__all__ = ["check_base", "modules_of", "take_stored"]

_KEY = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.secura_(?P<field>U|rows|cols|rho_max)")


def modules_of(tensors: Mapping[str, Tensor], written: AdapterConfig) -> dict[str, CURModule]:
    """Return the entries of ``adapter_model.safetensors`` by module.

    Raises:
        AdapterFormatError: a tensor is missing, unknown or damaged.
    """
    fields: dict[str, dict[str, Tensor]] = {}
    problems = []
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            problems.append(f"tensor {key!r} is not part of the format")
        else:
            fields.setdefault(match["module"], {})[match["field"]] = tensor.cpu()
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
    return modules


def check_base(
    modules: dict[str, CURModule], layers: dict[str, SecuraLayer], written: AdapterConfig
) -> None:
    """Compare targets and fingerprints with the base under the layers.

    Raises:
        BaseMismatchError: the adapter was trained on another base.
    """
    problems = [f"{m}: the base has no such target" for m in modules if m not in layers]
    problems += [f"{m}: targeted, but not in the file" for m in layers if m not in modules]
    for module, cur in modules.items():
        if module not in layers:
            continue
        claimed = written.base_fingerprint.get(module)
        if reason := mismatch(layers[module].pristine, cur.basis, claimed):
            problems.append(f"{module}: {reason}")
    if problems:
        more = f" (and {len(problems) - 1} more modules)" if len(problems) > 1 else ""
        raise BaseMismatchError(
            f"the adapter was trained on another base ({written.base_model_name_or_path}): "
            f"{problems[0]}{more}. Load it on that base, or train it again on this one"
        )


def take_stored(layer: SecuraLayer, name: str, config: SecuraConfig) -> None:
    """Prepare ``layer`` for a U that transformers copies from a folder, with s = 1.

    The indices are computed from W by the selection rule. The fingerprint covers indices and
    weights, so comparing it proves that both are those of the file's base.

    Raises:
        BaseMismatchError: the fingerprint differs.
        UnservableError: the adapter is to be trained, which needs more than U.
    """
    if not config.inference_mode:
        raise UnservableError(
            "load_adapter(is_trainable=True) takes only U, not what training goes on from; use "
            "PeftModel.from_pretrained(model, folder, is_trainable=True)"
        )
    if fingerprint(layer.pristine, layer.basis(name)) != config.base_fingerprint.get(layer.module):
        raise BaseMismatchError(
            f"{layer.module}: the adapter was trained on another base "
            f"({config.base_model_name_or_path}), or with indices that its selection does not "
            "give; PeftModel.from_pretrained(model, folder) reads the indices and says which"
        )
    none = torch.zeros(config.r, config.r)
    layer.load_core(name, CURModule(none, *layer.basis(name)), config)
