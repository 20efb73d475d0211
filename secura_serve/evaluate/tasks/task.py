"""What an offline task is: rows, how an answer is scored, how long it may be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from secura_serve.errors import ConfigError
from secura_serve.evaluate.metrics.scoring import SCORERS
from secura_serve.evaluate.tasks.rows import Row, Split, Splits

__all__ = ["Task", "score"]


def _nothing_missing() -> None:
    return None


@dataclass(frozen=True)
class Task:
    """A task whose rows are made or read on this machine, without a network.

    Raises:
        ConfigError: ``scoring`` is none of :data:`SCORERS`, or there is no room for an answer.
    """

    name: str
    title: str
    source: str
    """Where the rows come from, in words."""
    scoring: str
    """How one answer is scored: a key of :data:`SCORERS`. The metric is the share that is right."""
    max_new_tokens: int
    """Room for an answer, the same for every model: a base talks around what it says."""
    load: Callable[[], Splits]
    missing: Callable[[], str | None] = _nothing_missing
    """Why the rows cannot be had here, and what to do about it; None where they can."""
    stands_for: str | None = None
    """The task of the papers in whose place it stands."""

    def __post_init__(self) -> None:
        _scorer(self.scoring)
        if self.max_new_tokens < 1:
            raise ConfigError(f"task {self.name!r}: max_new_tokens must be >= 1")

    def rows(self, split: Split) -> list[Row]:
        """Return (prompt, completion) pairs, the same every time; no prompt is in two splits.

        The validation rows of ``sentiment``, ``extract`` and ``iso-date`` were among the training
        data of the adapters in this repository, their test rows were not.

        Raises:
            ConfigError: there is no such split.
            DataError: the package that carries them is not installed.
        """
        splits = self.load()
        if split not in splits:
            raise ConfigError(f"no split {split!r}; allowed: {', '.join(splits)}")
        return list(splits[split])

    def right(self, answers: Sequence[str], wanted: Sequence[str]) -> list[bool]:
        """Say of each answer whether it is right."""
        scorer = _scorer(self.scoring)
        return [scorer(a, w) for a, w in zip(answers, wanted, strict=True)]


def _scorer(name: str) -> Callable[[str, str], bool]:
    if name not in SCORERS:
        raise ConfigError(f"scoring {name!r}: unknown; allowed: {', '.join(SCORERS)}")
    return SCORERS[name]


def score(task: Task | str, answers: Sequence[str], wanted: Sequence[str]) -> float:
    """Return the share of right answers.

    Args:
        task: a task, or how to score: a key of :data:`SCORERS`.

    Raises:
        ConfigError: no such scoring.
    """
    if isinstance(task, Task):
        right = task.right(answers, wanted)
    else:
        scorer = _scorer(task)
        right = [scorer(a, w) for a, w in zip(answers, wanted, strict=True)]
    return sum(right) / len(right)
