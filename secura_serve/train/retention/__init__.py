"""The retention objective of ``--retain``: stay near what the base says on text of its own.

``text`` gets the rows, ``targets`` what the base says about them, ``objective`` adds the loss.
"""

from __future__ import annotations

from secura_serve.train.retention.objective import Retention, mean_retention, prepare_retention
from secura_serve.train.retention.targets import TOP, Targets, base_targets, bucketed_kl, compact
from secura_serve.train.retention.text import self_written_rows, supplied_rows

__all__ = [
    "TOP",
    "Retention",
    "Targets",
    "base_targets",
    "bucketed_kl",
    "compact",
    "mean_retention",
    "prepare_retention",
    "self_written_rows",
    "supplied_rows",
]
