"""Scores of a base and its adapters: tasks, how much of the base is kept, ``secura-eval``.

A task is rows and a way to score them (:func:`load_task`); a model is asked through an endpoint
or in this process; what an adapter costs elsewhere is :func:`retention`. What a sequence
of trainings forgets is :class:`secura_serve.accuracy_matrix.AccuracyMatrix`. The names load on
first use, so that ``secura-eval --help`` does not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

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


def __getattr__(name: str) -> Any:
    """Import the module behind a public name on first use.

    Raises:
        AttributeError: ``name`` is not public.
    """
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    # `retention` is a module too: importing that binds the module to the name, so bind it anew.
    globals()[name] = value
    return value
