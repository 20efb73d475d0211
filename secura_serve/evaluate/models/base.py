"""What an evaluation asks of a base and its adapters, wherever they run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

__all__ = ["Models", "Drift", "NEUTRAL_TOKENS"]

NEUTRAL_TOKENS = 64
"""Each neutral text is cut to as many."""


class Likelihood(NamedTuple):
    """Of given texts under one model: −Σ log p in nats, over this many predicted tokens."""

    nll: float
    tokens: int


@dataclass(frozen=True)
class Drift:
    """How far a model is from its base on neutral text; exact, over the whole vocabulary."""

    perplexity_ratio: float
    base_perplexity: float
    tokens: int
    kl: float | None
    """Mean KL(base ‖ model) per token in nats; None where it cannot be had."""
    kl_tokens: int
    kl_missing: str | None
    """Why there is no ``kl``."""


class Models(Protocol):
    """A base and models made from it. ``names`` are those asked, the base first if it answers."""

    where: str
    base: str | None
    names: tuple[str, ...]

    def answers(self, model: str, prompts: Sequence[str], max_new_tokens: int) -> list[str]:
        """Return one greedy answer per prompt."""
        ...

    def drift(self, model: str, texts: Sequence[str]) -> Drift:
        """Compare ``model`` with the base, on ``texts`` cut to :data:`NEUTRAL_TOKENS`."""
        ...

    def harness(self, model: str) -> Any:
        """Return the model as lm-evaluation-harness takes it."""
        ...
