"""Continual learning: one adapter trained on task after task, and what it forgets.

The names load on first use. :func:`register_strategy` makes a strategy of your own known.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from secura_serve.lazy import lazy
from secura_serve.train.continual.strategies import register_strategy

if TYPE_CHECKING:
    from secura_serve.train.continual.config import SequenceConfig
    from secura_serve.train.continual.loop import (
        Scorer,
        score_answers,
        train_sequence,
        write_sequence,
    )
    from secura_serve.train.continual.metrics import AccuracyMatrix
    from secura_serve.train.continual.results import Results, Stage
    from secura_serve.train.continual.strategies.base import Strategy

__all__ = [
    "AccuracyMatrix",
    "Results",
    "Scorer",
    "SequenceConfig",
    "Stage",
    "Strategy",
    "register_strategy",
    "score_answers",
    "train_sequence",
    "write_sequence",
]

__getattr__ = lazy(
    __name__,
    {
        "AccuracyMatrix": "metrics",
        "Results": "results",
        "Scorer": "loop",
        "SequenceConfig": "config",
        "Stage": "results",
        "Strategy": "strategies.base",
        "score_answers": "loop",
        "train_sequence": "loop",
        "write_sequence": "loop",
    },
)
