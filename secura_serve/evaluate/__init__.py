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
    "Interval": "metrics.significance",
    "Paired": "metrics.significance",
    "Retention": "metrics.retention",
    "SCORERS": "metrics.scoring",
    "TASKS": "tasks",
    "Task": "tasks",
    "answers": "models.generate",
    "evaluate": "run",
    "load_task": "tasks",
    "neutral_texts": "neutral_text",
    "paired": "metrics.significance",
    "register_task": "tasks",
    "retention": "metrics.retention",
    "score": "tasks",
    "score_json": "metrics.scoring",
    "score_label": "metrics.scoring",
    "score_word": "metrics.scoring",
    "wilson": "metrics.significance",
    "write_data": "tasks",
    "write_report": "report",
}

__all__ = [*_HOMES]
__getattr__ = lazy(__name__, _HOMES)
