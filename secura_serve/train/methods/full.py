"""``full``: all weights of the base are trained, and a whole checkpoint is written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from secura_serve.train.methods.registry import Method

__all__ = ["FULL"]


def _describe(settings: Mapping[str, Any], base: str) -> str:
    return f"All weights of `{base}` trained"


FULL = Method(
    summary="all weights",
    describe=_describe,
    defaults={"learning_rate": 2e-5},
    library="transformers",
)
