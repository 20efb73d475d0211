"""Scores of an adapter: tasks with lenient scoring, and how much of the base it keeps."""

from __future__ import annotations

from secura_serve.evaluate.generate import answers
from secura_serve.evaluate.retention import Retention, retention
from secura_serve.evaluate.tasks import SCORERS, score, score_json, score_label, score_word

__all__ = [
    "SCORERS",
    "Retention",
    "answers",
    "retention",
    "score",
    "score_json",
    "score_label",
    "score_word",
]
