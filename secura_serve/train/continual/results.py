"""``Results``: what was measured in a run over several tasks, as numbers and as a table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from secura_serve.train.continual.metrics import AccuracyMatrix
from secura_serve.train.loop.fit import FitResult

__all__ = ["Results", "Stage"]

Scores = dict[str, dict[str, float]]
"""Task -> name of a score -> its value."""


@dataclass(frozen=True)
class Stage:
    """The training of one task, and the scores of all tasks after it."""

    task: str
    examples: int
    replayed: int
    steps: int
    train_loss: float
    seconds: float
    tokens: int
    scores: Scores


@dataclass
class Results:
    """The stages so far, and the scores before the first one.

    Args:
        tasks: their names, in the order of training.
        score: the name of the score that is called accuracy.
        untrained: the scores before any training.
        history: what transformers logged, with steps counted through all tasks.
    """

    tasks: tuple[str, ...]
    score: str
    untrained: Scores = field(default_factory=dict)
    stages: list[Stage] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)

    def add(
        self, task: str, examples: int, replayed: int, fitted: FitResult, scores: Scores
    ) -> None:
        """Append a stage."""
        before = sum(stage.steps for stage in self.stages)
        self.history += [entry | {"step": entry["step"] + before} for entry in fitted.history]
        facts = (fitted.steps, fitted.train_loss, fitted.seconds, fitted.tokens)
        self.stages.append(Stage(task, examples, replayed, *facts, scores))

    def matrix(self, score: str | None = None) -> AccuracyMatrix:
        """Return one score of every task after every task, by default :attr:`score`.

        Raises:
            DataError: not all tasks have been trained yet.
        """
        name = score or self.score
        rows = [tuple(stage.scores[task][name] for task in self.tasks) for stage in self.stages]
        untrained = tuple(self.untrained[task][name] for task in self.tasks)
        return AccuracyMatrix(self.tasks, tuple(rows), untrained)

    def summary(self) -> dict[str, float]:
        """Return the measures of the whole run; a single task has no transfer and no forgetting."""
        matrix = self.matrix()
        measures = {
            "average_accuracy": matrix.average_accuracy,
            "backward_transfer": matrix.backward_transfer,
            "forgetting": matrix.forgetting,
            "forward_transfer": matrix.forward_transfer,
        }
        return {name: value for name, value in measures.items() if value is not None}

    def report(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        """Return the content of ``continual.json``; ``facts`` are those of ``train.json``.

        ``matrix`` holds R[i][j] for each score: that of task j after training on task i.
        """
        matrices = {name: self.matrix(name) for name in self.untrained[self.tasks[0]]}
        return {
            "tasks": list(self.tasks),
            "accuracy": self.score,
            **self.summary(),
            "matrix": {name: matrix.rows for name, matrix in matrices.items()},
            "untrained": {name: matrix.untrained for name, matrix in matrices.items()},
            "stages": [
                {k: v for k, v in asdict(stage).items() if k != "scores"} for stage in self.stages
            ],
            "seed": facts["config"]["seed"],
            **{name: facts[name] for name in ("config", "base", "data_sha256", "versions")},
        }

    def table(self) -> str:
        """Return the stages so far as Markdown: a row per stage, a column per task."""

        def row(name: str, scores: Scores) -> str:
            values = " | ".join(f"{scores[task][self.score]:.3f}" for task in self.tasks)
            return f"| {name} | {values} |\n"

        text = f"\n{self.score} on each task's test file, after each task:\n\n"
        text += f"| after | {' | '.join(self.tasks)} |\n|---{'|---' * len(self.tasks)}|\n"
        text += row("no training", self.untrained)
        return text + "".join(row(stage.task, stage.scores) for stage in self.stages)

    def latest(self) -> str:
        """Return the scores after the last stage in one line."""
        scores = self.stages[-1].scores
        return ", ".join(f"{task} {scores[task][self.score]:.3f}" for task in self.tasks)

    def to_json(self) -> dict[str, Any]:
        """Return everything, for :meth:`from_json`."""
        return asdict(self)

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Results:
        """Return the results that :meth:`to_json` was called on."""
        stages = [Stage(**stage) for stage in raw["stages"]]
        return cls(**{**raw, "tasks": tuple(raw["tasks"]), "stages": stages})
