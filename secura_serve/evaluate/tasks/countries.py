"""Facts about countries, from the PyPI package ``countryinfo``."""

from __future__ import annotations

from functools import cache
from importlib import metadata

from secura_serve.errors import DataError
from secura_serve.evaluate.tasks.registry import register_task
from secura_serve.evaluate.tasks.rows import Row, Splits, seeded
from secura_serve.evaluate.tasks.task import Task

__all__ = ["capitals", "currencies", "missing"]


def missing() -> str | None:
    """Say why the facts cannot be read here, if so."""
    try:
        metadata.version("countryinfo")
    except metadata.PackageNotFoundError:
        return "pip install countryinfo==1.0.1"
    return None


@cache
def _facts() -> list[tuple[str, str, list[str]]]:
    """Return name, capital and currency codes of each country, by name."""
    if reason := missing():
        raise DataError(f"the facts about countries are not installed: {reason}")
    from countryinfo import all_countries

    facts_by_code: dict[str, tuple[str, str, list[str]]] = {}
    for country in all_countries():
        name, capital = (country.name() or "").strip(), country.capital()
        # Some stand there under two names; whoever is asked for one must not be trained on the
        # other. Names such as "Palestine, State of" read badly in a question.
        if name and not set(",(") & set(name):
            facts_by_code.setdefault(
                str(country.iso()),
                (
                    name,
                    capital.strip() if isinstance(capital, str) else "",
                    list(country.currencies() or []),
                ),
            )
    return sorted(facts_by_code.values())


def _cut(rows: dict[str, Row]) -> Splits:
    """Split: half to train on, a fifth to validate, the rest to test.

    The place of a country is drawn once for all its questions: none is trained on in one task
    and asked for in another.
    """
    names = [name for name, _, _ in _facts()]
    seeded("countries").shuffle(names)
    first, second = len(names) // 2, len(names) * 7 // 10
    parts = {"train": names[:first], "validation": names[first:second], "test": names[second:]}
    return {part: [rows[name] for name in chosen if name in rows] for part, chosen in parts.items()}


@cache
def capitals() -> Splits:
    """Read countries -> their capitals. Places whose capital has their own name are left out.

    Raises:
        DataError: the package is not installed.
    """
    return _cut(
        {
            name: (f"What is the capital of {name}?", capital)
            for name, capital, _ in _facts()
            if capital and capital.lower() not in name.lower()
        }
    )


@cache
def currencies() -> Splits:
    """Read countries -> the ISO 4217 code of their currencies. Countries with several are left out.

    Raises:
        DataError: the package is not installed.
    """
    return _cut(
        {
            name: (
                f"Which currency is used in {name}? Answer with its three-letter code.",
                codes[0],
            )
            for name, _, codes in _facts()
            if len(codes) == 1 and len(codes[0]) == 3
        }
    )


register_task(
    Task(
        name="capitals",
        title="country -> capital",
        source="PyPI countryinfo",
        scoring="name",
        max_new_tokens=48,
        load=capitals,
        missing=missing,
    )
)
register_task(
    Task(
        name="currencies",
        title="country -> ISO 4217 code of its currency",
        source="PyPI countryinfo",
        scoring="word",
        max_new_tokens=48,
        load=currencies,
        missing=missing,
    )
)
