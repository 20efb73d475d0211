"""``full``: the weights themselves are trained, all or those of named linear layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from secura_serve.errors import ConfigError
from secura_serve.train.methods.registry import TARGET_SETTINGS, Method

if TYPE_CHECKING:
    from secura_serve.train.settings import TrainConfig

__all__ = ["FULL", "open_weights"]


def _describe(settings: Mapping[str, Any], base: str) -> str:
    if _all(settings["targets"], settings["exclude"], settings["layers"]):
        return f"All weights of `{base}` trained"
    parts = {"without": settings["exclude"], "of layers": settings["layers"]}
    narrowed = "".join(f" {word} `{value}`" for word, value in parts.items() if value)
    return f"The weights of the linear layers `{settings['targets']}`{narrowed} of `{base}` trained"


def _all(targets: str, exclude: str | None, layers: str | None) -> bool:
    return targets == "all-linear" and not exclude and not layers


def open_weights(model: Any, config: TrainConfig, common: dict[str, Any]) -> Any:
    """Let ``model`` be trained: all of it, or the weights of the linear layers that are named.

    A name fits the same layers as it does with an adapter. Everything else, biases included, stays
    as it is, to the last bit.

    Args:
        common: the settings that every adapter's configuration gets.

    Raises:
        ConfigError: no layer is named, or an output layer that is the embedding, too.
    """
    if _all(config.targets, config.exclude, config.layers):
        return model.requires_grad_(True)
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    from secura_serve.train.methods.base import last_names, linear_layers

    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    linears = linear_layers(model)
    if config.targets == "all-linear":
        common = common | {"target_modules": [n for n, m in linears.items() if m is not head]}
    matcher = LoraConfig(**common)
    chosen = {n: m for n, m in linears.items() if check_target_module_exists(matcher, n)}
    if not chosen:
        raise ConfigError(
            f"targets: {config.targets} names no linear layer of the base; they are "
            f"{last_names(linears)}"
        )
    if head in chosen.values() and head.weight is embedding.weight:
        raise ConfigError("targets: the base's output layer is its embedding; leave it out")
    model.requires_grad_(False)
    for module in chosen.values():
        module.weight.requires_grad_(True)
    return model


FULL = Method(
    summary="all weights, or those of --targets",
    describe=_describe,
    settings=TARGET_SETTINGS,
    defaults={"learning_rate": 2e-5},
    library="transformers",
)
