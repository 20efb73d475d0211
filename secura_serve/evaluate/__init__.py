"""Scores of a base and its adapters: tasks, how much of the base is kept, ``secura-eval``.

A task is rows and a way to score them (:func:`load_task`); a model is asked through an endpoint
or in this process; what an adapter costs elsewhere is :func:`retention`. What a run over
several tasks forgets is :class:`secura_serve.train.continual.metrics.AccuracyMatrix`. The names
load on first use, so that ``secura-eval --help`` does not wait for torch.
"""

from __future__ import annotations

from secura_serve.lazy import lazy

_HOMES = {
    "EvalConfig": "config",
    "Interval": "interval",
    "Paired": "interval",
    "Retention": "retention",
    "SCORERS": "scoring",
    "TASKS": "tasks",
    "Task": "tasks",
    "answers": "generate",
    "load_task": "tasks",
    "paired": "interval",
    "retention": "retention",
    "score": "tasks",
    "score_json": "scoring",
    "score_label": "scoring",
    "score_word": "scoring",
    "wilson": "interval",
    "write_data": "tasks",
}

__all__ = [*_HOMES]
__getattr__ = lazy(__name__, _HOMES)
