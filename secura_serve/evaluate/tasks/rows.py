"""Rows in three splits, and what the sources share."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from typing import Literal

__all__ = ["SPLITS", "Row", "Split", "Splits", "jsonl", "seeded", "three", "words"]

Row = tuple[str, str]
"""(prompt, completion)"""
Split = Literal["train", "validation", "test"]
Splits = Mapping[str, Sequence[Row]]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")

_SEED = 20260101
_VALIDATION = 200


def seeded(task: str) -> random.Random:
    """Return a task's random generator; the shipped adapters were trained on what it gives."""
    return random.Random(f"{_SEED}|{task}")


def three(train: Sequence[Row], test: Sequence[Row], validation: int = _VALIDATION) -> Splits:
    """Cut the validation rows off the end of ``train``."""
    return {"train": train[:-validation], "validation": train[-validation:], "test": test}


def jsonl(rows: Sequence[Row]) -> str:
    """Return one ``{"prompt", "completion"}`` object a line, as ``secura-train --data`` reads."""
    return "".join(
        json.dumps({"prompt": prompt, "completion": completion}, ensure_ascii=False) + "\n"
        for prompt, completion in rows
    )


def words(text: str) -> list[str]:
    """Return the words of a list written as one string."""
    return text.split()
