"""``Sequential``: each task starts where the last one ended, and nothing else is done."""

from __future__ import annotations

from secura_serve.train.continual.strategies.base import Strategy

__all__ = ["Sequential"]


class Sequential(Strategy):
    """SEQ: plain training on one task after another, the baseline of continual learning."""
