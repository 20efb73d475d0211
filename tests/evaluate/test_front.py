"""Proves that the questions of the front's experiment are many, are scored as they should be and
are trained on nowhere; that its rules choose what they say; that its report is what the runs give.

Needs pyyaml, a checkout (``benchmarks/``), and for the questions countryinfo and wordnet-base.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.utils import parametrize

pytest.importorskip("benchmarks.front", reason="not in a checkout")

from benchmarks.front import base, one, report, runs, verdicts
from benchmarks.front.natural_lora import set_lora_coordinates
from benchmarks.front.questions import Question, questions, right
from secura_serve.evaluate import TASKS
from secura_serve.evaluate.neutral_text import WORDNET, missing, neutral_texts
from secura_serve.evaluate.tasks import countries
from secura_serve.train.methods import prepare
from secura_serve.train.settings import TrainConfig

if reason := countries.missing():
    pytest.skip(reason, allow_module_level=True)
if not (WORDNET / "data.noun").is_file():
    pytest.skip("apt-get install wordnet-base", allow_module_level=True)


def grams(texts: list[str], n: int) -> Iterator[tuple[str, ...]]:
    for text in texts:
        words = text.lower().split()
        yield from (tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def test_there_are_many_questions_of_many_kinds() -> None:
    kinds = Counter(question.kind for question in questions())
    assert len(questions()) > 500 and len(kinds) == 10 and min(kinds.values()) > 30
    assert len({question.text for question in questions()}) == len(questions())
    assert all(question.accepted and all(question.accepted) for question in questions())
    by_text = {question.text: question for question in questions()}
    assert by_text["What is the past tense of the verb 'stand'?"].accepted == ("stood",)
    assert by_text["What is the chemical symbol for nitrogen?"].accepted == ("N",)


def test_an_answer_that_names_everything_is_wrong() -> None:
    question = Question("animal", "Is an ant a bird or an insect?", ("insect",), ("bird",))
    assert right(question, "An ant is an Insect.")
    assert not right(question, "An ant is a bird or an insect.")
    assert not right(question, "It is an insectivore.")


@pytest.mark.parametrize("name", list(TASKS))
def test_no_question_stands_in_training_rows(name: str) -> None:
    task = TASKS[name]
    if reason := task.missing():
        pytest.skip(reason)
    trained = [prompt for prompt, _ in task.rows("train")]
    asked = {question.text for question in questions()}
    assert not asked & set(trained)
    assert not any(text in prompt for prompt in trained for text in asked)
    assert not set(grams(trained, 8)) & set(grams(sorted(asked), 8))


def test_no_country_that_is_asked_for_is_trained_on() -> None:
    trained = " ".join(p for t in ("capitals", "currencies") for p, _ in TASKS[t].rows("train"))
    asked = [q for q in questions() if q.kind in ("continent", "people")]
    assert asked
    for question in asked:
        between = " is " if question.kind == "continent" else " from "
        name = question.text.rstrip("?").partition(between)[2]
        assert f" {name}?" not in trained, name


def test_questions_and_neutral_text_are_apart() -> None:
    if reason := missing():
        pytest.skip(reason)
    texts = neutral_texts().texts
    assert not set(grams(texts, 8)) & set(grams([q.text for q in questions()], 8))


def result(score: float, kl: float) -> dict[str, float]:
    return {"score": score, "kl": kl}


def test_the_rate_with_the_least_kl_among_those_that_score_enough(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    task, reference = next(iter(runs.PLAN["tasks"])), runs.PLAN["reference"]
    other = next(name for name in runs.PLAN["variants"] if name != reference)
    found: dict[str, dict[str, float]] = {}
    monkeypatch.setattr(runs, "read_runs", lambda file: found)
    for job, values in zip(runs.sweep(task, reference), [(0.7, 0.01), (0.9, 0.05)], strict=False):
        found[job.name] = result(*values)
    jobs = runs.sweep(task, other)
    for job in jobs:
        found[job.name] = result(0.8, 0.001)
    assert len(runs.sweep(task, reference)) > 2 and runs.chosen_lr(task, other) is None
    for job in runs.sweep(task, reference)[2:]:
        found[job.name] = result(0.85, 0.2)
    assert runs.wanted_score(task) == pytest.approx(0.9 - runs.PLAN["margin"])
    # None scores enough: the best score, and of two such the smaller KL.
    found[jobs[1].name] = result(0.81, 0.5)
    assert runs.chosen_lr(task, other) == jobs[1].lr
    # Two score enough: the one that keeps more, although it scores less.
    found[jobs[0].name], found[jobs[1].name] = result(0.895, 0.02), result(0.95, 0.03)
    assert runs.chosen_lr(task, other) == jobs[0].lr
    assert [job.lr for job in runs.tests(task, other)][:1] == [jobs[0].lr]
    # Of a choice between variants all rates count alike, and all must be there.
    third = next(name for name in runs.PLAN["variants"] if name not in (reference, other))
    monkeypatch.setitem(runs.PLAN, "choices", {"either": [other, third]})
    assert runs.chosen(task, "either") is None and runs.tests(task, "either") == []
    for job in runs.sweep(task, third):
        found[job.name] = result(0.9, 0.01)
    last = runs.sweep(task, third)[-1]
    found[last.name] = result(0.9, 0.005)
    assert runs.chosen(task, "either") == (third, last.lr)
    assert {job.variant for job in runs.tests(task, "either")} == {third}


def test_level_is_paired_over_rows_and_seeds() -> None:
    difference, (low, high) = verdicts.level(["1111", "1111"], ["1111", "1111"])
    assert (difference, low, high) == (0, 0, 0)
    difference, (low, high) = verdicts.level(["1" * 90 + "0" * 10], ["1" * 80 + "0" * 20])
    assert difference == pytest.approx(0.1) and 0 < low < 0.1 < high < 0.2


def test_intervals_of_kl_are_those_of_logarithms() -> None:
    assert verdicts.apart([0.010, 0.011, 0.012], [0.05, 0.06, 0.09]) is True
    assert verdicts.apart([0.010, 0.030, 0.050], [0.05, 0.06, 0.09]) is False
    assert verdicts.apart([0.01], [0.05, 0.06]) is None


def test_the_report_is_what_the_runs_give() -> None:
    file = runs.RESULTS / "report.md"
    if not file.exists():
        pytest.skip("no run is finished yet")
    assert file.read_text() == report.markdown()


@pytest.mark.long
def test_a_lora_in_natural_coordinates_starts_as_the_base_and_is_plain_in_the_end(
    tiny_base: Callable[[str], Path], tmp_path: Path
) -> None:
    settings = {"rank": 2, "device": "cpu", "dtype": "float32", "method": "lora"}
    config = TrainConfig(base=str(tiny_base("llama")), data="none", out=str(tmp_path), **settings)
    prepared = prepare(config)
    ids = torch.arange(3, 23)[None]
    layers = set_lora_coordinates(prepared, 0.01, sequences=4, length=8)
    with torch.no_grad(), prepared.model.disable_adapter():
        plain = prepared.model(input_ids=ids).logits
    with torch.no_grad():
        torch.testing.assert_close(prepared.model(input_ids=ids).logits, plain)
    trained = [n for n, p in prepared.model.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * len(layers)
    torch.manual_seed(0)
    for layer in layers:
        for part in (layer.lora_A["default"], layer.lora_B["default"]):
            part.parametrizations.weight.original.data.normal_(std=0.3)
    with torch.no_grad():
        before = prepared.model(input_ids=ids).logits
        for layer in layers:
            for part in (layer.lora_A["default"], layer.lora_B["default"]):
                parametrize.remove_parametrizations(part, "weight", leave_parametrized=True)
        torch.testing.assert_close(prepared.model(input_ids=ids).logits, before)
        prepared.model.merge_adapter()
        after = prepared.model(input_ids=ids).logits
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-3)


@pytest.mark.long
@pytest.mark.parametrize(
    ("kind", "task", "variant"),
    [
        ("sweep", "iso-date", "natural-kept"),
        ("test", "iso-date", "natural"),
        ("test", "iso-date", "lora"),
        ("sweep", "iso-date", "corda"),
        ("sweep", "iso-date", "natural-lora"),
        ("continual", "er", "natural"),
    ],
)
def test_a_run_from_plan_to_result(
    tiny_base: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    kind: str, task: str, variant: str,
) -> None:  # fmt: skip
    """On a tiny base that knows nothing, so every answer to three questions counts as right."""
    small = {"device": "cpu", "dtype": "float32", "max_steps": 1, "targets": "q_proj,down_proj"}
    plan = runs.PLAN | {"base": str(tiny_base("llama")), "common": runs.PLAN["common"] | small}
    plan["continual"] = plan["continual"] | {
        "test": 4,
        "common": {"tasks": "iso-date,extract", "max_steps": 1, "max_length": 512},
    }
    kept = {"rank": 8, "retain_sequences": 4, "retain_length": 8}
    for name, spec in plan["variants"].items():
        more = kept if spec.get("retain") else {"rank": 8}
        plan["variants"] = plan["variants"] | {name: spec | more}
    plan["tasks"] = {"iso-date": {"max_length": 512}}
    counts = {"validation": 20, "test": 30}
    few = {split: TASKS["iso-date"].rows(split)[:n] for split, n in counts.items()}
    monkeypatch.setattr(runs, "PLAN", plan)
    monkeypatch.setattr(one, "PLAN", plan)
    monkeypatch.setattr(one, "load_task", lambda name: replace(TASKS[name], load=lambda: few))
    monkeypatch.setattr(base, "questions", lambda: questions()[:3])
    monkeypatch.setattr(base, "right", lambda *_: True)
    monkeypatch.setenv("SECURA_CACHE", str(tmp_path / "cache"))
    job = runs._job(kind, task, variant, 1e-3, 0)
    facts = (one.sequence if kind == "continual" else one.single)(job, tmp_path / "work")
    # Rounding can make it negative where nothing has moved.
    assert facts["kl"] > -1e-6 and facts["perplexity_ratio"] > 0
    if kind == "continual":
        assert len(facts["matrix"]) >= 2 and facts["still_right"]["n"] == 3
        return
    count = counts["validation" if kind == "sweep" else "test"]
    assert len(facts["right"]) == count and facts["score"] == facts["right"].count("1") / count
    if kind == "test":
        assert facts["unchanged"]["n"] == 3 and facts["kl_served"] > -1e-6
    assert len(list((tmp_path / "work" / "base").glob("*.pt"))) == (2 if kind == "test" else 1)
