"""English text that has nothing to do with any task: Debian's ``fortunes``, else WordNet."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import NamedTuple

from secura_serve.errors import DataError

__all__ = ["Prose", "missing", "neutral_texts"]

FORTUNES = Path("/usr/share/games/fortunes")
WORDNET = Path("/usr/share/wordnet")
_FILES = ("literature", "wisdom", "science", "work", "education")
_COUNT, _WORDS = 48, 40


class Prose(NamedTuple):
    """Passages of at least 40 words, and where they come from."""

    source: str
    texts: list[str]


def missing() -> str | None:
    """Say why there is no neutral text here, if so."""
    if any((FORTUNES / name).is_file() for name in _FILES) or (WORDNET / "data.noun").is_file():
        return None
    return "apt-get install fortunes (or wordnet-base)"


def neutral_texts(count: int = _COUNT) -> Prose:
    """Return ``count`` passages of English prose, the same ones every time.

    Raises:
        DataError: neither package is installed.
    """
    if reason := missing():
        raise DataError(f"no neutral English text is installed: {reason}")
    name, pool = _fortunes() or _wordnet()
    return Prose(f"{count} passages of {name}", random.Random(0).sample(sorted(set(pool)), count))


def _fortunes() -> tuple[str, list[str]] | None:
    texts = []
    for file in (FORTUNES / name for name in _FILES):
        if file.is_file():
            parts = re.split(r"^%$", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
            texts += [" ".join(p.split()) for p in parts if len(p.split()) >= _WORDS]
    return (f"Debian fortunes ({', '.join(_FILES)})", texts) if texts else None


def _wordnet() -> tuple[str, list[str]]:
    """Put together definitions of nouns that follow one another until they are long enough."""
    texts, passage = [], ""
    for line in (WORDNET / "data.noun").read_text(encoding="utf-8").splitlines():
        head, bar, gloss = line.partition(" | ")
        if not bar:
            continue
        lemma = head.split()[4].replace("_", " ")
        passage += f"{lemma.capitalize()}: {gloss.split(';')[0].strip()}. "
        if len(passage.split()) >= _WORDS:
            texts.append(passage.strip())
            passage = ""
    return "definitions in Debian's WordNet", texts
