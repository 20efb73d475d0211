"""``lora`` and ``dora``: plain PEFT adapters, to compare with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from secura_serve.train.methods.registry import ADAPTER_SETTINGS, Method

if TYPE_CHECKING:
    from peft import PeftConfig

    from secura_serve.train.settings import TrainConfig

__all__ = ["DORA", "LORA"]


def _peft_config(config: TrainConfig, common: dict[str, Any]) -> PeftConfig:
    from peft import LoraConfig

    return LoraConfig(
        **common,
        lora_alpha=config.lora_alpha or 2 * config.rank,
        lora_dropout=config.dropout,
        use_dora=config.method == "dora",
    )


def _describe(settings: Mapping[str, Any], base: str) -> str:
    name = {"lora": "LoRA", "dora": "DoRA"}[settings["method"]]
    return f"A plain PEFT {name} adapter for `{base}`, rank {settings['rank']}"


LORA = Method(
    summary="plain PEFT LoRA",
    describe=_describe,
    peft_config=_peft_config,
    settings=ADAPTER_SETTINGS | {"lora_alpha"},
    defaults={"learning_rate": 1e-3},
    tags=("lora",),
)
DORA = Method(
    summary="plain PEFT DoRA",
    describe=_describe,
    peft_config=_peft_config,
    settings=ADAPTER_SETTINGS | {"lora_alpha"},
    defaults={"learning_rate": 1e-3},
    tags=("dora",),
)
