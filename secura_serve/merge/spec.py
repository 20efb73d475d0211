"""How an adapter is named with its weight: ``folder`` or ``folder*weight``."""

from __future__ import annotations

from secura_serve.errors import ConfigError

__all__ = ["MAX_WEIGHT", "split_weight"]

MAX_WEIGHT = 1000.0
"""Largest |weight|. A useful one is near 1; from far beyond this, half precision overflows."""


def split_weight(spec: str) -> tuple[str, float]:
    """Return folder and weight of ``folder*weight``; the weight is 1 where none is given.

    Raises:
        ConfigError: the weight is not a number, is 0, or is beyond ±:data:`MAX_WEIGHT`.
    """
    folder, star, number = spec.rpartition("*")
    if not star:
        return spec, 1.0
    try:
        weight = float(number)
    except ValueError:
        weight = 0.0
    # NaN compares false.
    if not 0 < abs(weight) <= MAX_WEIGHT:
        raise ConfigError(
            f"--adapter {spec}: {number!r} is no weight, which is a number between -{MAX_WEIGHT:g} "
            f"and {MAX_WEIGHT:g} other than 0; write folder*0.5"
        )
    return folder, weight
