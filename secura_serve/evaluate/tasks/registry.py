"""The offline tasks by name. A file in this folder adds its own with :func:`register_task`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from secura_serve.errors import ConfigError, DataError
from secura_serve.evaluate.tasks.rows import SPLITS, jsonl
from secura_serve.evaluate.tasks.task import Task
from secura_serve.registry import Registry
from secura_serve.suggest import did_you_mean
from secura_serve.system.atomic import place_problem

__all__ = ["TASKS", "load_task", "register_task", "suggestion", "write_data"]

TASKS: dict[str, Task] = {}
"""Read it; :func:`register_task` adds to it."""
_BY_ANY_NAME: Registry[Task] = Registry("task")


def register_task(task: Task, *other_names: str) -> Task:
    """Make ``task`` known to :func:`load_task` and ``secura-eval``, and return it.

    Raises:
        ConfigError: another task has that name.
    """
    for name in (task.name, *other_names):
        _BY_ANY_NAME.add(name, task)
    TASKS[task.name] = task
    return task


def suggestion(name: str, known: Sequence[str]) -> str:
    """Return ``unknown; allowed: a, b; did you mean 'a'?``."""
    return f"unknown; allowed: {', '.join(known)}{did_you_mean(name, known)}"


def load_task(name: str) -> Task:
    """Return a task by name.

    Raises:
        ConfigError: there is none of that name; the message suggests one.
    """
    if name not in _BY_ANY_NAME:
        raise ConfigError(f"task {name!r}: {suggestion(name, sorted(TASKS))}")
    return _BY_ANY_NAME[name]


def write_data(names: Sequence[str], folder: Path, *, overwrite: bool = False) -> list[Path]:
    """Write ``<task>.<split>.jsonl`` for each task, as ``secura-train`` reads it.

    Raises:
        ConfigError: a name is unknown, another file of that name would be lost, or nothing can be
            written in ``folder``.
        DataError: rows cannot be had here; nothing was written.
    """
    if os.path.isfile(folder):
        raise ConfigError(f"--write-data {folder} is a file; name a folder")
    if problem := place_problem(folder / "*.jsonl"):
        raise ConfigError(f"--write-data: {problem}; name another folder")
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
