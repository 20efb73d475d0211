"""Word problems about small numbers, made from templates: a stand-in for GSM8K."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import cache

from secura_serve.evaluate.tasks.registry import register_task
from secura_serve.evaluate.tasks.rows import Row, Splits, seeded, words
from secura_serve.evaluate.tasks.task import Task

__all__ = ["arithmetic"]

_SIZES = {"train": 1600, "validation": 200, "test": 250}
_NAMES = {
    "train": words("Anna Ben Clara David Emma Felix Grace Henry Ida Jack Kate Leo Maya Nick"),
    "test": words("Olga Peter Ruth Sam Tina Victor"),
}
_THINGS = {
    "train": words("apples books coins marbles pencils stamps stickers cards shells buttons"),
    "test": words("oranges beads crayons magazines ribbons"),
}

# A kind of problem: its numbers with the steps that solve it, then the wordings to train on and
# the ones that are only ever tested.
Made = tuple[dict[str, int], str, int]


def _add(rng: random.Random) -> Made:
    a, b = rng.randint(3, 60), rng.randint(3, 39)
    return {"a": a, "b": b}, f"{a} + {b} = {a + b}", a + b


def _take(rng: random.Random) -> Made:
    a = rng.randint(12, 90)
    b = rng.randint(3, a - 2)
    return {"a": a, "b": b}, f"{a} - {b} = {a - b}", a - b


def _times(rng: random.Random) -> Made:
    a, b = rng.randint(2, 12), rng.randint(3, 12)
    return {"a": a, "b": b}, f"{a} * {b} = {a * b}", a * b


def _share(rng: random.Random) -> Made:
    b, each = rng.randint(2, 9), rng.randint(2, 12)
    return {"a": b * each, "b": b}, f"{b * each} / {b} = {each}", each


def _times_then_take(rng: random.Random) -> Made:
    a, b = rng.randint(2, 9), rng.randint(3, 10)
    c = rng.randint(2, a * b - 1)
    whole, left = a * b, a * b - c
    return {"a": a, "b": b, "c": c}, f"{a} * {b} = {whole}. {whole} - {c} = {left}", left


def _add_then_take(rng: random.Random) -> Made:
    a, b = rng.randint(10, 50), rng.randint(5, 40)
    c = rng.randint(3, a + b - 2)
    whole, left = a + b, a + b - c
    return {"a": a, "b": b, "c": c}, f"{a} + {b} = {whole}. {whole} - {c} = {left}", left


_KINDS: tuple[tuple[Callable[[random.Random], Made], Sequence[str], Sequence[str]], ...] = (
    (
        _add,
        (
            "{name} has {a} {thing} and gets {b} more. How many {thing} does {name} have now?",
            "There are {a} {thing} on a table. {name} puts {b} more beside them. "
            "How many {thing} are on the table?",
            "{name} found {a} {thing} on Monday and {b} on Tuesday. How many is that in all?",
        ),
        ("A box holds {a} {thing}, a bag holds {b}. {name} owns both. How many {thing} is that?",),
    ),
    (
        _take,
        (
            "{name} has {a} {thing} and gives {b} away. How many {thing} are left?",
            "Of {a} {thing}, {name} lost {b}. How many does {name} still have?",
            "A shop had {a} {thing}. {name} bought {b} of them. How many are left in the shop?",
        ),
        ("{name} wants {a} {thing} and already owns {b}. How many are still to be found?",),
    ),
    (
        _times,
        (
            "{name} fills {a} boxes with {b} {thing} each. How many {thing} is that?",
            "Each of {a} children brings {b} {thing} to {name}. "
            "How many {thing} does {name} receive?",
            "{name} buys {b} {thing} every day for {a} days. How many {thing} does {name} buy?",
        ),
        ("On {a} shelves stand {b} {thing} each, says {name}. How many {thing} stand there?",),
    ),
    (
        _share,
        (
            "{name} shares {a} {thing} equally among {b} friends. How many does each friend get?",
            "{a} {thing} are packed into {b} equal bags by {name}. How many are in each bag?",
            "In {b} days {name} used {a} {thing}, every day as many. How many were used a day?",
        ),
        ("{name} puts {a} {thing} in {b} rows of equal length. How many are in one row?",),
    ),
    (
        _times_then_take,
        (
            "{name} has {a} boxes of {b} {thing} and gives {c} {thing} away. How many are left?",
            "{name} buys {a} packs with {b} {thing} each and loses {c}. "
            "How many {thing} does {name} still have?",
        ),
        ("{a} friends gave {name} {b} {thing} each; {c} of them broke. How many are whole?",),
    ),
    (
        _add_then_take,
        (
            "{name} had {a} {thing}, got {b} more and then sold {c}. How many are left?",
            "{name} collects {a} {thing} in May and {b} in June, and gives {c} away in July. "
            "How many {thing} does {name} keep?",
        ),
        ("From {a} old and {b} new {thing}, {name} throws {c} out. How many {thing} remain?",),
    ),
)


@cache
def arithmetic() -> Splits:
    """Make word problems of one or two steps -> the steps and the answer.

    Validation has the wordings of the training rows with other numbers; test has wordings, names
    and things that are nowhere else.
    """
    rows_by_split: dict[str, list[Row]] = {}
    seen: set[str] = set()
    for split, size in _SIZES.items():
        rng = seeded(f"arithmetic|{split}")
        pool = "test" if split == "test" else "train"
        rows: list[Row] = []
        while len(rows) < size:
            make, known, held_out = _KINDS[len(rows) % len(_KINDS)]
            numbers, steps, result = make(rng)
            form = rng.choice(held_out if split == "test" else known)
            fields = {"name": rng.choice(_NAMES[pool]), "thing": rng.choice(_THINGS[pool])}
            prompt = form.format(**fields, **numbers)
            if prompt not in seen:
                seen.add(prompt)
                rows.append((prompt, f"{steps}. The answer is {result}."))
        rng.shuffle(rows)
        rows_by_split[split] = rows
    return rows_by_split


register_task(
    Task(
        name="arithmetic",
        title="word problem of one or two steps -> steps and answer",
        source="made from templates",
        scoring="number",
        max_new_tokens=96,
        load=arithmetic,
        stands_for="GSM8K",
    )
)
