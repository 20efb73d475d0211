"""The continual-learning strategies: what is done about forgetting. One file and one line each.

This module imports no strategy before it is used: ``secura-train --help`` must not wait for torch.
"""

from __future__ import annotations

from secura_serve.train.continual.strategies.registry import (
    STRATEGIES,
    StrategyEntry,
    get_strategy,
    register_strategy,
)

__all__ = ["STRATEGIES", "StrategyEntry", "get_strategy", "register_strategy"]

_HERE = __name__

register_strategy("seq", f"{_HERE}.seq:Sequential", summary="nothing")
register_strategy(
    "er",
    f"{_HERE}.er:Replay",
    summary="replay of earlier examples",
    settings=("replay", "replay_share"),
)
register_strategy(
    "ewc",
    f"{_HERE}.ewc:EWC",
    summary="a penalty on moving what earlier tasks depend on",
    settings=("ewc_lambda", "ewc_samples"),
    conflicts={"fusion_step": "fusion keeps setting B to 0"},
)
register_strategy(
    "ilora",
    f"{_HERE}.ilora:ILoRA",
    summary="replay, and a slow copy of what is trained, which is evaluated and written instead",
    settings=("replay", "replay_share", "ema_decay", "consistency"),
    conflicts={
        "packing": "it treats replayed examples apart",
        "patience": "its slow copy has no best step",
    },
)
