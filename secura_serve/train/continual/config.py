"""``SequenceConfig``: the settings of a sequence of tasks, and the files that the tasks name."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from secura_serve.config import NOT_NEGATIVE, POSITIVE, SHARE, at_least, option
from secura_serve.errors import ConfigError
from secura_serve.train.continual.strategies import STRATEGIES
from secura_serve.train.settings import TrainConfig

__all__ = ["SCORES", "SequenceConfig", "SequenceTask"]

SCORES = ("exact_match", "token_accuracy")


@dataclass(frozen=True)
class SequenceTask:
    """One task of a sequence: its name and its two files."""

    name: str
    train: str
    test: str


@dataclass(frozen=True, kw_only=True)
class SequenceConfig(TrainConfig):
    """The settings of a run over several tasks, one after another: those of one run, and these.

    Raises:
        ConfigError: listing every setting that is out of bounds, contradicts another one or is
            not supported by the strategy, and every task that has no files.
    """

    data: str = option("not with --tasks", "")
    tasks: str = option(
        "tasks to train one after another, joined by commas: NAME=TRAIN:TEST (two files), or NAME, "
        "whose files are NAME.train.jsonl and NAME.test.jsonl in --tasks-dir"
    )
    tasks_dir: str | None = option("folder of the tasks that are given by name alone", None)
    strategy: str = option(
        "what is done about forgetting: "
        + ", ".join(f"{name} = {entry.summary}" for name, entry in STRATEGIES.items()),
        "seq",
        STRATEGIES,
    )
    replay: int = option("er, ilora: number of examples in the buffer", 500, bound=at_least(1))
    replay_share: float = option("er, ilora: replayed examples per new one", 0.2, bound=POSITIVE)
    ewc_lambda: float = option("ewc: weight of the penalty", 1.0, bound=POSITIVE)
    ewc_samples: int = option(
        "ewc: examples per task to compute its Fisher information from", 256, bound=at_least(1)
    )
    ema_decay: float = option(
        "ilora: share of the slow copy that is kept at each step; use less for tasks of few steps",
        0.99,
        bound=SHARE,
    )
    consistency: float = option(
        "ilora: weight of the squared distance between the logits", 0.99, bound=NOT_NEGATIVE
    )
    score: str = option(
        "what is called accuracy, measured on each task's test file after each task: exact_match = "
        "share of greedy answers that are right token for token, token_accuracy = share of answer "
        "tokens that are the most likely one",
        "exact_match",
        SCORES,
    )
    keep_stages: bool = option(
        "also write the adapter after each task, as OUT-1-NAME, OUT-2-NAME, ... beside --out", False
    )

    def _not_supported(self) -> list[str]:
        supported = STRATEGIES[self.strategy].settings
        others = {name for entry in STRATEGIES.values() for name in entry.settings}
        return super()._not_supported() + [
            f"{item.name}: not supported by strategy {self.strategy}; leave it out"
            for item in fields(self)
            if item.name in others.difference(supported)
            and getattr(self, item.name) != item.default
        ]

    def _contradictions(self) -> list[str]:
        problems = [
            problem
            for wrong, problem in (
                (self.data, "data: not with --tasks, which names the data"),
                (self.eval_data, "eval_data: not with --tasks, which names the test files"),
                (self.push_to, "push_to: not with --tasks"),
                (self.resume not in (None, "auto"), "resume: must be auto with --tasks"),
            )
            if wrong
        ]
        problems += [
            f"{name}: not with strategy {self.strategy}: {reason}"
            for name, reason in STRATEGIES[self.strategy].conflicts.items()
            if getattr(self, name)
        ]
        try:
            self.task_list()
        except ConfigError as error:
            problems += error.problems
        return super()._contradictions() + problems

    def task_list(self) -> list[SequenceTask]:
        """Return the tasks in their order; their files are looked for, not read.

        Raises:
            ConfigError: listing each task that is not well named or has no files.
        """
        tasks: list[SequenceTask] = []
        problems = []
        for text in (part.strip() for part in self.tasks.split(",") if part.strip()):
            name, given, files = text.partition("=")
            train, colon, test = files.partition(":")
            if not re.fullmatch(r"\w[\w.-]*", name, re.ASCII):
                problems.append(f"tasks: got the name {name!r}, allowed: letters, digits, . _ -")
            if given and not (train and colon and test):
                problems.append(f"tasks: got {text!r}, must be NAME=TRAIN:TEST or NAME")
                continue
            if not given and self.tasks_dir is None:
                problems.append(f"tasks: {name} names no files; write NAME=TRAIN:TEST, or give")
                problems[-1] += " --tasks-dir"
                continue
            if not given:
                stem = Path(self.tasks_dir or "") / name
                train, test = f"{stem}.train.jsonl", f"{stem}.test.jsonl"
            problems += [
                f"tasks: {name}: no file {path}"
                for path in (train, test)
                if not os.path.isfile(path)
            ]
            tasks.append(SequenceTask(name, train, test))
        names = [task.name for task in tasks]
        problems += [f"tasks: {n} is named twice" for n in sorted(set(names)) if names.count(n) > 1]
        if problems or not tasks:
            raise ConfigError("the tasks are not valid:", problems or ["tasks: none is named"])
        return tasks

    def sources(self) -> dict[str, str]:
        """Return the files of all tasks: ``NAME.train`` and ``NAME.test`` -> path."""
        files = {
            f"{task.name}.{split}": getattr(task, split)
            for task in self.task_list()
            for split in ("train", "test")
        }
        return files | ({"basis": self.basis} if self.basis else {})

    def portable(self) -> dict[str, Any]:
        """Return the settings as a recipe keeps them; the files of the tasks lose their folders."""
        tasks = [f"{t.name}={Path(t.train).name}:{Path(t.test).name}" for t in self.task_list()]
        single = {
            k: v for k, v in super().portable().items() if k == "basis" or k not in self.sources()
        }
        return single | {"tasks": ",".join(tasks), "tasks_dir": None}
