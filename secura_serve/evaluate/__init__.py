"""Scores of a base and its adapters: tasks, how much of the base is kept, ``secura-eval``.

A task is rows and a way to score them (:func:`load_task`); a model is asked through an endpoint
or in this process; what an adapter costs elsewhere is :func:`retention`. What a run over
several tasks forgets is :class:`secura_serve.train.continual.metrics.AccuracyMatrix`. The names
load on first use, so that ``secura-eval --help`` does not wait for torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from secura_serve.lazy import lazy

if TYPE_CHECKING:
    from secura_serve.evaluate.config import EvalConfig as EvalConfig
    from secura_serve.evaluate.metrics.retention import Retention as Retention
    from secura_serve.evaluate.metrics.retention import retention as retention
    from secura_serve.evaluate.metrics.scoring import SCORERS as SCORERS
    from secura_serve.evaluate.metrics.scoring import score_json as score_json
    from secura_serve.evaluate.metrics.scoring import score_label as score_label
    from secura_serve.evaluate.metrics.scoring import score_word as score_word
    from secura_serve.evaluate.metrics.significance import Interval as Interval
    from secura_serve.evaluate.metrics.significance import Paired as Paired
    from secura_serve.evaluate.metrics.significance import paired as paired
    from secura_serve.evaluate.metrics.significance import wilson as wilson
    from secura_serve.evaluate.models.generate import answers as answers
    from secura_serve.evaluate.neutral_text import neutral_texts as neutral_texts
    from secura_serve.evaluate.report import write_report as write_report
    from secura_serve.evaluate.run import evaluate as evaluate
    from secura_serve.evaluate.tasks import TASKS as TASKS
    from secura_serve.evaluate.tasks import Task as Task
    from secura_serve.evaluate.tasks import load_task as load_task
    from secura_serve.evaluate.tasks import register_task as register_task
    from secura_serve.evaluate.tasks import score as score
    from secura_serve.evaluate.tasks import write_data as write_data

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
if not TYPE_CHECKING:
    __getattr__ = lazy(__name__, _HOMES)
