"""Proves that the experiment's log keeps every finished run, whoever is killed, and that the report
in the repository is what the log gives.

Needs pyyaml and a checkout (``benchmarks/``).
"""

from __future__ import annotations

import json
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("benchmarks.experiment", reason="not in a checkout")

from benchmarks.experiment import report
from benchmarks.experiment.run import waiting
from benchmarks.experiment.runs import FILE, RESULTS, append_run, read_runs


def test_the_report_is_what_the_runs_give() -> None:
    measured = report.single()
    judged = report.claims(measured)
    assert (RESULTS / "report.md").read_text() == report.markdown(measured, judged)
    summary = json.loads((RESULTS / "summary.json").read_text())
    assert summary == json.loads(json.dumps({"single": measured, "claims": judged}))


def test_a_finished_experiment_has_nothing_to_run() -> None:
    assert not list(waiting(None)) and len(read_runs(FILE)) == 99


def test_a_run_that_was_cut_off_is_no_run_and_spoils_no_other(tmp_path: Path) -> None:
    file = tmp_path / "runs.jsonl"
    assert read_runs(file) == {}
    append_run({"name": "a", "score": 1}, file)
    with file.open("a") as log:
        log.write('{"name": "b", "sco')
    assert read_runs(file) == {"a": {"name": "a", "score": 1}}
    append_run({"name": "c", "score": 3}, file)
    append_run({"name": "a", "score": 2}, file)
    assert {name: run["score"] for name, run in read_runs(file).items()} == {"a": 2, "c": 3}


def _append(number: int, file: Path) -> None:
    append_run({"name": str(number), "filler": "x" * 20_000}, file)


def test_processes_that_append_at_once_lose_nothing(tmp_path: Path) -> None:
    file = tmp_path / "runs.jsonl"
    with ProcessPoolExecutor(4) as pool:
        for done in [pool.submit(_append, number, file) for number in range(40)]:
            done.result()
    assert len(file.read_text().splitlines()) == len(read_runs(file)) == 40
