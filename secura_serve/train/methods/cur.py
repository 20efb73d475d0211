"""``curlora`` and ``secura``: a CUR adapter, of which only the core U is trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from secura_serve.train.methods.registry import ADAPTER_SETTINGS, Method

if TYPE_CHECKING:
    from peft import PeftConfig

    from secura_serve.train.settings import TrainConfig

__all__ = ["CURLORA", "SECURA"]

_SETTINGS = ADAPTER_SETTINGS | {
    *("core", "inner_rank", "init", "magnorm", "tau", "magnorm_parameters", "alpha"),
    *("selection", "selection_seed", "basis", "fusion_step"),
    *("coordinates", "damping"),
    *("push_to", "push_name", "push_every"),
}


def _peft_config(config: TrainConfig, common: dict[str, Any]) -> PeftConfig:
    from secura_serve.train.tuner import SecuraConfig

    if config.dropout:
        common = common | {"dropout": config.dropout}
    # A calibrated basis is among the common settings, and says what its selection is.
    if "basis" not in common:
        selection = {"rule": config.selection, "seed": config.selection_seed}
        common = common | {"selection": selection}
    return SecuraConfig(
        **common,
        alpha=config.alpha_value(),
        core=config.core or "u",
        inner_rank=config.inner_rank,
        init=config.init,
        magnorm=config.magnorm_settings(),
    )


def _describe(settings: Mapping[str, Any], base: str) -> str:
    natural = ", natural coordinates" if settings.get("coordinates") == "natural" else ""
    return (
        f"A CUR adapter (ΔW = C·U·R, only U trained) for `{base}`: rank {settings['rank']}, core "
        f"`{settings['core']}`, S-MagNorm `{settings['magnorm']}`{natural}"
    )


CURLORA = Method(
    summary="U of C·U·R",
    describe=_describe,
    peft_config=_peft_config,
    settings=_SETTINGS,
    defaults={"core": "u", "magnorm": "none", "learning_rate": 4e-3},
    is_cur=True,
    library="secura-serve",
    tags=("secura", "cur", "peft"),
)
SECURA = Method(
    summary="the same with core ab and magnorm bounded",
    describe=_describe,
    peft_config=_peft_config,
    settings=_SETTINGS,
    defaults={"core": "ab", "magnorm": "bounded", "learning_rate": 1e-2},
    is_cur=True,
    library="secura-serve",
    tags=("secura", "cur", "peft"),
)
