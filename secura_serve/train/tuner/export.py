"""``exported``: a tuned model's adapter as this project's format has it, without a disk."""

from __future__ import annotations

import copy

from torch import nn

from secura_serve.adapter import AdapterConfig, CURModule
from secura_serve.errors import ConfigError
from secura_serve.train.tuner.model import adapter_layers

__all__ = ["exported"]


def exported(model: nn.Module, name: str = "default") -> tuple[AdapterConfig, dict[str, CURModule]]:
    """Return the configuration and the tensors of adapter ``name`` as they are now, on the CPU.

    Args:
        model: what ``get_peft_model`` returned, perhaps wrapped for several processes, or a
            transformers model with an adapter in it.

    Raises:
        ConfigError: the model has no such SECURA adapter.
    """
    layers = adapter_layers(model, name)
    # DistributedDataParallel keeps the model in .module.
    configs = getattr(getattr(model, "module", model), "peft_config", {})
    if not layers or name not in configs:
        raise ConfigError(
            f"the model has no SECURA adapter {name!r}; make one with get_peft_model(model, "
            "SecuraConfig(...)), or name the adapter"
        )
    # A copy: the caller's configuration is PEFT's, and only PEFT writes to it.
    settings = copy.copy(configs[name])
    settings.base_fingerprint = {m: layer.fingerprint(name) for m, layer in layers.items()}
    modules = {module: layer.export(name) for module, layer in layers.items()}
    return settings.to_adapter_config(), modules
