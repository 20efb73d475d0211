"""German nouns and their English names, from Debian's ``trans-de-en`` (the Chemnitz dictionary)."""

from __future__ import annotations

import re
from collections import defaultdict
from functools import cache
from pathlib import Path

from secura_serve.errors import DataError
from secura_serve.evaluate.tasks.registry import register_task
from secura_serve.evaluate.tasks.rows import Splits, seeded, three
from secura_serve.evaluate.tasks.task import Task

__all__ = ["missing", "translation"]

FILE = Path("/usr/share/trans/de-en")
_TRAIN, _TEST = 1800, 250
_NOTES = re.compile(r"\s*(?:\{[^}]*\}|\[[^]]*\]|\([^)]*\))")
_NOUN = re.compile(r"[A-ZÄÖÜ][a-zäöüß]{3,17}")
_ENGLISH = re.compile(r"[a-z]{3,}(?: [a-z]{3,})?")


def missing() -> str | None:
    """Say why the dictionary cannot be read here, if so."""
    return None if FILE.is_file() else "apt-get install trans-de-en"


@cache
def translation() -> Splits:
    """Read German nouns -> English, where the dictionary knows one meaning with one translation.

    Raises:
        DataError: the dictionary is not installed.
    """
    if reason := missing():
        raise DataError(f"translation-de-en: the dictionary is not installed: {reason}")
    meanings: dict[str, set[str]] = defaultdict(set)
    plain = set()
    for line in FILE.read_text(encoding="utf-8").splitlines():
        german, separator, english = line.partition(" :: ")
        if not separator or line.startswith("#"):
            continue
        # The first of several forms is the singular; what follows are plurals and phrases.
        heads, names = german.split("|")[0], english.split("|")[0]
        for head in heads.split(";"):
            meanings[_NOTES.sub("", head).strip()].add(_NOTES.sub("", names).strip())
        if re.search(r"\{[mfn]\}", heads) and "[" not in heads + names:
            plain.add(_NOTES.sub("", heads).strip())
    rows = []
    for noun in sorted(plain & meanings.keys()):
        names_in_english = meanings[noun]
        if (
            len(names_in_english) == 1
            and _NOUN.fullmatch(noun)
            and _ENGLISH.fullmatch(word := next(iter(names_in_english)))
        ):
            rows.append((f"Translate this German word into English: {noun}", word))
    rows = seeded("translation-de-en").sample(rows, _TEST + _TRAIN)
    return three(rows[_TEST:], rows[:_TEST])


register_task(
    Task(
        name="translation-de-en",
        title="German noun -> English",
        source="Debian trans-de-en",
        scoring="word",
        max_new_tokens=48,
        load=translation,
        missing=missing,
    )
)
