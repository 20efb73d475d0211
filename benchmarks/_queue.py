"""Runs of an experiment as a queue of processes, which can be stopped and resumed at any run."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from benchmarks._report import ROOT

__all__ = ["add_queue_flags", "run_process", "work_off"]


def add_queue_flags(parser: argparse.ArgumentParser, *, jobs: int, work: Path) -> None:
    """Add the flags that every queue has."""
    parser.add_argument("--jobs", type=int, default=jobs, help="runs at a time (%(default)s)")
    parser.add_argument("--until-minutes", type=float, help="start nothing after so many")
    parser.add_argument("--pause-file", type=Path, help="start nothing while this file exists")
    parser.add_argument("--work", type=Path, default=work, help="scratch folder")
    parser.add_argument("--dry-run", action="store_true", help="list what can run now")


def run_process(module: str, name: str, work: Path) -> str:
    """Run ``python -m module NAME WORK`` on one thread, and return what to say of it."""
    command = [sys.executable, "-m", module, name, str(work.absolute())]
    env = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    start = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    spent = f"{(time.monotonic() - start) / 60:.1f} min"
    if done.returncode:
        return f"{name}: failed after {spent}\n{done.stderr[-2000:]}"
    return f"{name}: {done.stdout.strip().splitlines()[-1]} ({spent})"


def work_off(
    ready: Callable[[], Sequence[str]],
    start: Callable[[str], str],
    finished: Callable[[str], bool],
    given: argparse.Namespace,
) -> None:
    """Run what is ready until nothing is; a run that failed is not tried again.

    Args:
        ready: the names of the runs that can start, in order; asked again after each.
        start: runs one and returns what to say of it.
        finished: whether a run's result is there.
        given: of the flags of :func:`add_queue_flags`.
    """
    end = time.monotonic() + 60 * (given.until_minutes or 1e6)
    running, failed = dict[str, Future[str]](), set[str]()
    with ThreadPoolExecutor(given.jobs) as pool:
        while True:
            for name, future in list(running.items()):
                if future.done():
                    print(future.result(), flush=True)
                    del running[name]
                    if not finished(name):
                        failed.add(name)
            paused = given.pause_file is not None and given.pause_file.exists()
            waiting = [name for name in ready() if name not in running.keys() | failed]
            over = time.monotonic() >= end
            if not paused and not over:
                for name in waiting[: given.jobs - len(running)]:
                    running[name] = pool.submit(start, name)
            if not running and (over or not waiting):
                break
            time.sleep(1)
