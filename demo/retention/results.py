"""Files with results that the page is started with: an experiment's, a continual run's."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from secura_serve.system.os_errors import reason

from ..figure_table import figure_table

__all__ = ["Matrix", "Point", "Results", "heat", "heat_cell", "heat_table", "read_results"]

SHAPES = (
    'an experiment\'s summary ({"single": {variant: {"score": {"mean"}, "kl": {"mean"}}}}), or a '
    'continual run\'s {"tasks": [...], "accuracy": name, "matrix": {name: rows}}'
)


@dataclass(frozen=True)
class Point:
    """One variant of an experiment: its score, and how far it moved the base."""

    name: str
    score: float
    kl: float
    task: str | None = None
    """Name of the adapter that learned the same, if the file says so."""


@dataclass(frozen=True)
class Matrix:
    """R[i][j]: the score of task j after training on task i."""

    title: str
    tasks: tuple[str, ...]
    rows: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Results:
    points: tuple[Point, ...] = ()
    matrices: tuple[Matrix, ...] = ()


def read_results(files: Sequence[str]) -> Results:
    """Read all files. Raises ValueError if one of them has neither known shape."""
    points: list[Point] = []
    matrices: list[Matrix] = []
    for name in files:
        try:
            raw = json.loads(Path(name).read_text(encoding="utf-8"))
            if "single" in raw:
                points += _points(raw["single"], raw.get("task"))
            else:
                matrices.append(_matrix(raw, Path(name)))
        except OSError as error:
            raise ValueError(f"cannot read {name}: {reason(error)}") from error
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise ValueError(f"{name} should be JSON of {SHAPES}") from error
    return Results(tuple(points), tuple(matrices))


def heat_table(matrix: Matrix) -> str:
    """Return the matrix as a table whose cells are the greener the higher they are."""
    heads = "".join(f"<th scope=col>{escape(task)}</th>" for task in ("after", *matrix.tasks))
    rows = "".join(
        f"<tr><th scope=row>{escape(task)}</th>{''.join(map(_cell, row))}</tr>"
        for task, row in zip(matrix.tasks, matrix.rows, strict=True)
    )
    caption = f"{escape(matrix.title)}: accuracy on each task, after training on each in turn"
    return figure_table(f"Accuracy matrix of {matrix.title}", heads, rows, caption=caption)


def heat(share: float) -> str:
    """Return the style of a value between 0 and 1; the page's theme has the colours."""
    return f"--heat: {100 * min(max(share, 0.0), 1.0):.0f}%"


def heat_cell(share: float, text: str, title: str = "") -> str:
    """Return a cell of a table; its text says the value that the colour shows."""
    more = f' title="{escape(title)}"' if title else ""
    return f'<td class="heat" style="{heat(share)}"{more}>{escape(text)}</td>'


def _cell(value: float) -> str:
    # What was not measured is NaN.
    return heat_cell(value, f"{value:.2f}") if math.isfinite(value) else "<td>–</td>"


def _points(single: dict[str, Any], task: object) -> list[Point]:
    known = task if isinstance(task, str) else None
    return [
        Point(str(name), float(facts["score"]["mean"]), float(facts["kl"]["mean"]), known)
        for name, facts in single.items()
        if facts.get("score") and facts.get("kl")
        if math.isfinite(facts["score"]["mean"])
    ]


def _matrix(raw: dict[str, Any], file: Path) -> Matrix:
    tasks = tuple(map(str, raw["tasks"]))
    rows = raw["matrix"][raw["accuracy"]] if isinstance(raw["matrix"], dict) else raw["matrix"]
    numbers = tuple(tuple(float(value) for value in row) for row in rows)
    if len(numbers) != len(tasks) or any(len(row) != len(tasks) for row in numbers):
        raise ValueError("not square")
    return Matrix(str(raw.get("name") or file.parent.name or file.name), tasks, numbers)
