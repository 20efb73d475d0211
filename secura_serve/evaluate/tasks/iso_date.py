"""Dates in words, made up from the calendar."""

from __future__ import annotations

import datetime
from functools import cache

from secura_serve.evaluate.tasks.registry import register_task
from secura_serve.evaluate.tasks.rows import Row, Splits, seeded, three, words
from secura_serve.evaluate.tasks.task import Task

__all__ = ["iso_date"]

_TRAIN, _TEST = 1200, 250
_MONTHS = words(
    "January February March April May June July August September October November December"
)


def _ordinal(day: int) -> str:
    ending = "th" if 10 <= day % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(day % 10, "th")
    return f"{day}{ending}"


@cache
def iso_date() -> Splits:
    """Make dates of 1900 to 2099 in one of ten styles -> YYYY-MM-DD; no date comes twice."""
    rng = seeded("iso-date")
    first = datetime.date(1900, 1, 1)
    days = rng.sample(range((datetime.date(2100, 1, 1) - first).days), _TEST + _TRAIN)

    def row(offset: int) -> Row:
        date = first + datetime.timedelta(days=offset)
        month, day, year = _MONTHS[date.month - 1], date.day, date.year
        weekday = date.strftime("%A")
        text = rng.choice(
            (
                f"{month} {day}, {year}",
                f"{day} {month} {year}",
                f"the {_ordinal(day)} of {month} {year}",
                f"{month} {_ordinal(day)}, {year}",
                f"{month[:3]} {day} {year}",
                f"{day} {month[:3]}. {year}",
                f"{weekday}, {month} {day}, {year}",
                f"{weekday} {day} {month} {year}",
                f"the {_ordinal(day)} day of {month} in the year {year}",
                f"{year}, {month} {day}",
            )
        )
        return f"Write this date in the format YYYY-MM-DD: {text}", date.isoformat()

    rows = [row(offset) for offset in days]
    return three(rows[_TEST:], rows[:_TEST])


register_task(
    Task(
        name="iso-date",
        title="date in words -> YYYY-MM-DD",
        source="made from the calendar",
        scoring="word",
        max_new_tokens=48,
        load=iso_date,
    )
)
