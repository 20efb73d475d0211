"""Proves that the experiment's log keeps every finished run, whoever is killed, that the report in
the repository is what the log gives, and that a queue runs what is ready, waits and ends.

Needs pyyaml and a checkout (``benchmarks/``).
"""

from __future__ import annotations

import json
import threading
from argparse import Namespace
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("benchmarks.experiment", reason="not in a checkout")

from benchmarks._queue import run_process, work_off
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


def given(**more: object) -> Namespace:
    return Namespace(**({"jobs": 2, "until_minutes": None, "pause_file": None} | more))


def test_a_queue_runs_what_becomes_ready_and_tries_no_failed_run_again() -> None:
    done, started = set[str](), list[str]()

    def start(name: str) -> str:
        started.append(name)
        if name != "fails":
            done.add(name)
        return name

    def ready() -> list[str]:
        names = ["a", "fails", *(["later"] if "a" in done else [])]
        return [name for name in names if name not in done]

    work_off(ready, start, done.__contains__, given())
    assert sorted(started) == ["a", "fails", "later"]
    work_off(lambda: ["b"], start, done.__contains__, given(until_minutes=1e-9))
    assert "b" not in started


@pytest.mark.long
def test_a_queue_starts_nothing_while_the_pause_file_exists(tmp_path: Path) -> None:
    pause, done = tmp_path / "pause", set[str]()
    pause.touch()

    def start(name: str) -> str:
        assert not pause.exists()
        done.add(name)
        return name

    timer = threading.Timer(1.5, pause.unlink)
    timer.start()
    work_off(lambda: sorted({"a"} - done), start, done.__contains__, given(pause_file=pause))
    timer.join()
    assert done == {"a"}


@pytest.mark.long
def test_a_run_that_fails_says_why(tmp_path: Path) -> None:
    said = run_process("benchmarks.experiment.one", "no-such-run", tmp_path)
    assert said.startswith("no-such-run: failed") and "StopIteration" in said
