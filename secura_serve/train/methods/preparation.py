"""``prepare``: load a base and put the adapter of a method on it."""

from __future__ import annotations

from typing import Any

from peft import get_peft_model

from secura_serve.adapter import load_basis
from secura_serve.bases import EMBEDDED
from secura_serve.errors import ConfigError, SecuraError
from secura_serve.method import CALIBRATED
from secura_serve.train.basis.make import basis_of_run
from secura_serve.train.coordinates import set_natural_coordinates
from secura_serve.train.methods.base import last_names, linear_layers, load_base
from secura_serve.train.methods.full import open_weights
from secura_serve.train.methods.prepared import PreparedModel
from secura_serve.train.methods.registry import METHODS
from secura_serve.train.settings import TrainConfig

__all__ = ["prepare"]


def prepare(config: TrainConfig) -> PreparedModel:
    """Load the base and put the method's adapter on it; draws from torch's random numbers.

    Raises:
        BaseModelError: the base cannot be loaded.
        ConfigError: the targets do not fit the base.
    """
    method = METHODS[config.method]
    # A file that is missing or damaged is reported before the weights are loaded.
    basis = load_basis(config.basis) if config.basis else None
    # Full training keeps float32 weights: bfloat16 swallows steps under 1/256 of a weight.
    dtype = "float32" if method.trains_all_weights else config.dtype
    model, tokenizer, model_id = load_base(config.base, dtype, config.device)
    # PEFT records the model's own name, which is the local folder. Plain PEFT must find the base
    # without us, and only we know the embedded one by its name.
    if method.is_cur or model_id != EMBEDDED:
        model.name_or_path = model_id
    layers = getattr(model.config, "num_hidden_layers", 0)
    if beyond := [n for n in config.layer_numbers() or () if n >= layers]:
        raise ConfigError(f"layers: the base has layers 0-{layers - 1}, got {beyond}")
    modules = [name for name, _ in model.named_modules()]
    common = _adapter_settings(config, model.name_or_path)
    if method.peft_config is None:
        return PreparedModel(open_weights(model, config, common), tokenizer, model_id, config)
    if config.selection == CALIBRATED:
        common["basis"] = basis or basis_of_run(config, model, tokenizer, model_id)
    try:
        adapted = get_peft_model(model, method.peft_config(config, common))
    except ValueError as error:
        if isinstance(error, SecuraError):
            raise
        why = str(error).partition("\n")[0].rstrip(".")
        known = last_names(linear_layers(model))
        raise ConfigError(f"targets: {why}; the linear layers are {known}") from error
    targets = adapted.base_model.targeted_module_names
    message = f"names no module that would be adapted; the others adapt {last_names(targets)}"
    _refuse_unused_names(config.target_modules(), targets, f"targets: {{}} {message}")
    _refuse_unused_names(config.exclude_modules(), modules, "exclude: the base has no module {}")
    prepared = PreparedModel(adapted, tokenizer, model_id, config)
    if config.coordinates == "natural":
        set_natural_coordinates(prepared, config.damping)
    return prepared


def _refuse_unused_names(wanted: str | list[str] | None, modules: list[str], message: str) -> None:
    """Refuse names that fit no module; PEFT ignores them as long as another one fits."""
    unused = [
        name
        for name in (wanted if isinstance(wanted, list) else [])
        if not any(module == name or module.endswith(f".{name}") for module in modules)
    ]
    if unused:
        raise ConfigError(message.format(", ".join(unused)))


def _adapter_settings(config: TrainConfig, model_id: str) -> dict[str, Any]:
    """Return the arguments that every ``PeftConfig`` gets."""
    return {
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model_id,
        "r": config.rank,
        "target_modules": config.target_modules(),
        "exclude_modules": config.exclude_modules(),
        "layers_to_transform": config.layer_numbers(),
        "layers_pattern": config.layers_pattern,
    }
