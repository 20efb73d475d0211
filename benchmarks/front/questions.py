"""General-knowledge questions, to see whether an adapter lets the base answer as before.

From PyPI ``countryinfo`` and Debian's ``wordnet-base``; nothing of it is trained on. Countries that
training rows of ``capitals`` and ``currencies`` ask for are left out. Which questions the base
answers rightly is measured once, see :mod:`benchmarks.front.base`.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from secura_serve.errors import DataError
from secura_serve.evaluate import load_task
from secura_serve.evaluate.metrics.scoring import score_name
from secura_serve.evaluate.neutral_text import WORDNET
from secura_serve.evaluate.tasks.rows import words

__all__ = ["Question", "ROOM", "questions", "right"]

ROOM = 32
"""Tokens that an answer may have."""
_PER_KIND = 60
# Symbols that are English words, or read like one: they stand in an answer by chance.
_WORDS = frozenset(words("a ac am as at be he i in la no o os pa pm po re s u y"))
_ANIMALS = {"bird": "01503061", "fish": "02512053", "insect": "02159955", "mammal": "01861778"}


class Question(NamedTuple):
    """A question and all answers that are right."""

    kind: str
    text: str
    accepted: tuple[str, ...]
    refused: tuple[str, ...] = ()
    """Answers of which none may stand beside the right one: who names all knows nothing."""


def right(question: Question, answer: str) -> bool:
    """Say whether an accepted answer stands in ``answer``, whole, in any case, and none refused."""
    accepted, refused = (
        any(score_name(answer, word) for word in some)
        for some in (question.accepted, question.refused)
    )
    return accepted and not refused


@cache
def questions() -> tuple[Question, ...]:
    """Return all questions, the same every time; at most 60 of a kind, and no text twice.

    Raises:
        DataError: a source is not installed.
    """
    if not (WORDNET / "data.noun").is_file():
        raise DataError("the general-knowledge questions need: apt-get install wordnet-base")
    kinds = [*_countries(), _elements(), _animals(), _opposites(), _past_tenses(), _plurals()]
    drawn: dict[str, Question] = {}
    for pool in kinds:
        some = sorted(set(pool))
        random.Random(f"questions {some[0].kind}").shuffle(some)
        drawn |= {question.text: question for question in some[:_PER_KIND]}
    return tuple(drawn.values())


def _countries() -> Iterator[list[Question]]:
    """Ask for countries that no training row asks for, see ``secura_serve.evaluate.tasks``."""
    from countryinfo import all_countries

    trained = {
        prompt for task in ("capitals", "currencies") for prompt, _ in load_task(task).rows("train")
    }

    def unseen(name: str) -> bool:
        return not set(",(") & set(name) and not any(name in prompt for prompt in trained)

    known = [c for c in all_countries() if c.name() and unseen(c.name())]
    yield [
        Question("capital", prompt, (answer,))
        for prompt, answer in load_task("capitals").rows("test")
    ]
    yield [
        Question("currency", prompt, (answer,))
        for prompt, answer in load_task("currencies").rows("test")
    ]
    yield [
        Question("continent", f"On which continent is {c.name()}?", (place,))
        for c in known
        if (place := _continent(c))
    ]
    yield [
        Question("country", f"In which country is the city of {c.capital()}?", (c.name(),))
        for c in known
        if isinstance(c.capital(), str) and c.capital() and not _alike(c.name(), c.capital())
    ]
    yield [
        Question("people", f"What do you call a person from {c.name()}?", (c.demonym(),))
        for c in known
        if str(c.demonym() or "").isalpha() and not _alike(c.name(), c.demonym())
    ]


def _alike(one: str, other: str) -> bool:
    return one in other or other in one


def _continent(country: Any) -> str | None:
    if country.region() in ("Africa", "Asia", "Europe"):
        return str(country.region())
    return "South America" if country.subregion() == "South America" else None


class _Synset(NamedTuple):
    """An entry of ``data.noun`` or ``data.adj``."""

    offset: str
    words: list[str]
    gloss: str
    pointers: list[list[str]]
    """Symbol, offset, part of speech, and the numbers of the two words, of each."""


@cache
def _synsets(part: str) -> tuple[_Synset, ...]:
    found = []
    for line in _lines(WORDNET / f"data.{part}"):
        if line.startswith(" "):
            continue
        head, _, gloss = line.partition(" | ")
        fields = head.split()
        count = int(fields[3], 16)
        names = [w.partition("(")[0].replace("_", " ") for w in fields[4 : 4 + 2 * count : 2]]
        rest = fields[4 + 2 * count :]
        pointers = [rest[1 + 4 * i : 5 + 4 * i] for i in range(int(rest[0]))]
        found.append(_Synset(fields[0], names, gloss, pointers))
    return tuple(found)


def _lines(file: Path) -> list[str]:
    return file.read_text(encoding="utf-8").splitlines()


@cache
def _uses() -> Counter[str]:
    """Return how often each word (with its part of speech, 1 to 5) was counted in tagged text."""
    uses: Counter[str] = Counter()
    for line in _lines(WORDNET / "cntlist.rev"):
        key, _, count = line.split()
        word, _, sense = key.partition("%")
        uses[f"{word.replace('_', ' ')} {sense[0]}"] += int(count)
    return uses


def _common(many: Iterable[str], part: int, fewest: int) -> list[str]:
    return [w for w in many if w.isalpha() and _uses()[f"{w} {part}"] >= fewest]


def _elements() -> list[Question]:
    found = []
    for entry in _synsets("noun"):
        symbols = [w for w in entry.words if len(w) <= 2 and w[0].isupper()]
        names = [w for w in entry.words if len(w) > 2 and w.islower()]
        if "element" in entry.gloss and len(symbols) == 1 and names:
            text = f"What is the chemical symbol for {names[0]}?"
            if symbols[0].lower() not in _WORDS:
                found.append(Question("element", text, (symbols[0],)))
    return found


def _animals() -> list[Question]:
    """Ask for the class of common animals: those below bird, fish, insect and mammal."""
    parents = {
        entry.offset: [offset for symbol, offset, *_ in entry.pointers if symbol == "@"]
        for entry in _synsets("noun")
    }

    def above(offset: str) -> set[str]:
        return {offset}.union(*(above(parent) for parent in parents[offset]))

    # The meaning that comes first: a soldier is an insect, too.
    first = {line.split()[0]: line for line in _lines(WORDNET / "index.noun") if line[0] != " "}
    found = []
    for entry in _synsets("noun"):
        name, up = entry.words[0], above(entry.offset)
        classes = [kind for kind, root in _ANIMALS.items() if root in up]
        if len(classes) != 1 or entry.offset in _ANIMALS.values() or not _common([name], 1, 2):
            continue
        _, _, _, pointers, *rest = first[name].split()
        if rest[int(pointers) + 2] == entry.offset:
            article = "an" if name[0] in "aeiou" else "a"
            text = f"Is {article} {name} a bird, a fish, an insect or a mammal?"
            others = tuple(kind for kind in _ANIMALS if kind != classes[0])
            found.append(Question("animal", text, (classes[0],), others))
    return found


def _opposites() -> list[Question]:
    by_offset = {entry.offset: entry.words for entry in _synsets("adj")}
    pairs: dict[str, set[str]] = {}
    for entry in _synsets("adj"):
        for symbol, offset, part, ends in entry.pointers:
            if symbol == "!" and part == "a":
                word = entry.words[int(ends[:2], 16) - 1]
                pairs.setdefault(word, set()).add(by_offset[offset][int(ends[2:], 16) - 1])
    return [
        Question("opposite", f"What is the opposite of the word '{word}'?", tuple(sorted(others)))
        for word, others in pairs.items()
        # Not "unhappy", which only repeats the question, and not what the task sentiment answers.
        if _common([word], 3, 10)
        and not any(_alike(word, other) or other in ("positive", "negative") for other in others)
    ]


def _irregular(part: str, number: int, fewest: int) -> dict[str, set[str]]:
    """Return word -> its irregular forms, of words that are common."""
    forms: dict[str, set[str]] = {}
    for line in _lines(WORDNET / f"{part}.exc"):
        form, *bases = line.split()
        for word in _common(bases, number, fewest):
            forms.setdefault(word, set()).add(form)
    return forms


def _past_tenses() -> list[Question]:
    return [
        Question("past tense", f"What is the past tense of the verb '{word}'?", tuple(sorted(past)))
        for word, forms in _irregular("verb", 2, 20).items()
        if (past := {f for f in forms if not f.endswith(("ing", "s"))})
    ]


def _plurals() -> list[Question]:
    return [
        Question("plural", f"What is the plural of the noun '{word}'?", tuple(sorted(forms)))
        for word, forms in _irregular("noun", 1, 2).items()
        if word not in forms
    ]
