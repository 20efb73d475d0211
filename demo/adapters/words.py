"""What the numbers of a card mean, in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["kept", "number", "recipe"]

CORES = {"u": "core U", "ab": "core A·B"}
# Older recipes have the shorter names.
RATES = ("learning_rate", "lr")
BATCHES = ("per_device_train_batch_size", "batch_size")


def number(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, (int, float)) else str(value)


def kept(retention: Mapping[str, Any]) -> str:
    """Return how far an adapter moves the base; empty if nothing is known."""
    parts = []
    if (kl := retention.get("kl")) is not None:
        parts.append(f"moved by KL {number(kl)} per token of neutral text")
    if (share := retention.get("still_right")) is not None:
        parts.append(f"{100 * share:.0f} % of its right answers stay right")
    if (ratio := retention.get("perplexity_ratio")) is not None:
        parts.append(f"perplexity times {number(ratio)}")
    return "; ".join(parts)


def recipe(settings: Mapping[str, Any]) -> str:
    """Return the settings that most differ between adapters; empty if none of them is known."""
    rate, batch = _first(settings, RATES), _first(settings, BATCHES)
    steps, method = settings.get("max_steps"), settings.get("method")
    parts = [
        str(method) if method else "",
        f"learning rate {number(rate)}" if rate is not None else "",
        _steps(steps, batch),
        CORES.get(str(settings.get("core")), ""),
        "natural coordinates" if settings.get("coordinates") == "natural" else "",
        f"seed {number(settings['seed'])}" if "seed" in settings else "",
    ]
    return ", ".join(filter(None, parts))


def _first(settings: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    return next((settings[name] for name in names if settings.get(name) is not None), None)


def _steps(steps: object, batch: object) -> str:
    # No limit is told as none, or as a number below 1.
    if not isinstance(steps, (int, float)) or steps <= 0:
        return f"batches of {number(batch)}" if batch is not None else ""
    return f"{number(steps)} steps" + (f" of {number(batch)} examples" if batch is not None else "")
