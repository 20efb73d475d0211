"""The methods: what of a base is trained, and the base prepared for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from peft.tuners._buffer_dict import BufferDict
from safetensors.torch import save_file
from torch import Tensor, nn

from secura_serve.bases import EMBEDDED
from secura_serve.errors import ConfigError, SecuraError
from secura_serve.train import SecuraConfig
from secura_serve.train.base import load_base
from secura_serve.train.settings import CUR_METHODS, TrainConfig

__all__ = ["Tuned", "kept_tensors", "prepare", "restore", "save_kept"]


@dataclass(frozen=True)
class Tuned:
    """A base that is ready to be trained, with the settings that made it so."""

    model: Any
    """A ``PeftModel``; with method ``full`` the transformers model itself."""
    tokenizer: Any
    model_id: str
    config: TrainConfig

    @property
    def is_cur(self) -> bool:
        """Whether the adapter is one of this project's."""
        return self.config.method in CUR_METHODS


def prepare(config: TrainConfig) -> Tuned:
    """Load the base and put the method's adapter on it; draws from torch's random numbers.

    Raises:
        BaseModelError: the base cannot be had.
        ConfigError: the targets do not fit the base.
    """
    # Full training keeps float32 weights: bfloat16 swallows steps under 1/256 of a weight.
    dtype = "float32" if config.method == "full" else config.dtype
    model, tokenizer, model_id = load_base(config.base, dtype, config.device)
    # PEFT records what the model says, which is the local folder. Plain PEFT must find the base
    # without us, and only we know the embedded one by its name.
    if config.method in CUR_METHODS or model_id != EMBEDDED:
        model.name_or_path = model_id
    layers = getattr(model.config, "num_hidden_layers", 0)
    if beyond := [n for n in config.layer_numbers() or () if n >= layers]:
        raise ConfigError(f"--layers: the base has layers 0-{layers - 1}, got {beyond}")
    if config.method == "full":
        return Tuned(model.requires_grad_(True), tokenizer, model_id, config)
    modules = [name for name, _ in model.named_modules()]
    try:
        tuned = get_peft_model(model, _peft_config(config, model.name_or_path))
    except ValueError as error:
        if isinstance(error, SecuraError):
            raise
        raise ConfigError(f"--targets: {error}".partition("\n")[0]) from error
    adapted = tuned.base_model.targeted_module_names
    leaves = sorted({module.rpartition(".")[2] for module in adapted})
    said = f"names no module that would be adapted; the others adapt {', '.join(leaves)}"
    _refuse_idle_names(config.target_modules(), adapted, f"--targets: {{}} {said}")
    _refuse_idle_names(config.exclude_modules(), modules, "--exclude: the base has no module {}")
    return Tuned(tuned, tokenizer, model_id, config)


def _refuse_idle_names(wanted: str | list[str] | None, modules: list[str], said: str) -> None:
    """PEFT passes over a name that fits nothing as long as another one fits."""
    idle = [
        name
        for name in (wanted if isinstance(wanted, list) else [])
        if not any(module == name or module.endswith(f".{name}") for module in modules)
    ]
    if idle:
        raise ConfigError(said.format(", ".join(idle)))


def _peft_config(config: TrainConfig, model_id: str) -> PeftConfig:
    common: dict[str, Any] = {
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model_id,
        "r": config.rank,
        "target_modules": config.target_modules(),
        "exclude_modules": config.exclude_modules(),
        "layers_to_transform": config.layer_numbers(),
        "layers_pattern": config.layers_pattern,
    }
    if config.method not in CUR_METHODS:
        return LoraConfig(
            **common,
            lora_alpha=config.lora_alpha or 2 * config.rank,
            lora_dropout=config.dropout,
            use_dora=config.method == "dora",
        )
    norm = {"mode": config.magnorm} | ({"tau": config.tau} if config.magnorm == "bounded" else {})
    if config.dropout:
        common["dropout"] = config.dropout
    return SecuraConfig(
        **common,
        alpha=config.alpha_value(),
        selection={"rule": config.selection, "seed": config.selection_seed},
        core=config.core or "u",
        inner_rank=config.inner_rank,
        init=config.init,
        magnorm=None if config.magnorm == "none" else norm,
    )


def kept_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint must hold: what is trained, and what else belongs to an adapter.

    The latter are the tensors under the adapter's prefix that get no gradient: the indices, and
    the running core of ``--fusion-step``.
    """
    prefix = getattr(getattr(model, "base_model", None), "prefix", None)
    parameters = {
        name: value
        for name, value in model.named_parameters()
        if value.requires_grad or (prefix and prefix in name)
    }
    buffers = {n: v for n, v in model.named_buffers() if prefix and prefix in n}
    return parameters | buffers


def save_kept(model: nn.Module, file: Path) -> None:
    """Write :func:`kept_tensors` as safetensors."""
    save_file({k: v.detach().contiguous() for k, v in kept_tensors(model).items()}, file)


@torch.no_grad()
def restore(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put :func:`kept_tensors` back; a running core is there from its first fusion on.

    Raises:
        ConfigError: they belong to another method or base.
    """
    held = kept_tensors(model)
    tables = {n: m for n, m in model.named_modules() if isinstance(m, BufferDict)}
    for name in held.keys() ^ tensors.keys():
        table, _, leaf = name.rpartition(".")
        if table not in tables:
            raise ConfigError(f"the checkpoint belongs to another method or base: {name} differs")
        if name in held:
            del tables[table][leaf]
        else:
            tables[table][leaf] = tensors[name].to(next(model.parameters()).device, copy=True)
    for name in held.keys() & tensors.keys():
        held[name].copy_(tensors[name])
