"""The finished runs of the experiment: one line of JSON each, in ``runs.jsonl``.

Several processes may append at a time, and any of them may be killed: a line is written at once
under a lock, and one that was cut off is not a run.
"""

from __future__ import annotations

import fcntl
import json
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parents[1] / "results" / "experiment"
FILE = RESULTS / "runs.jsonl"


def read_runs(file: Path = FILE) -> dict[str, dict[str, Any]]:
    """Return name -> what a run measured; of two of one name the later."""
    if not file.exists():
        return {}
    stat = file.stat()
    return _read(file, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=1)
def _read(file: Path, size: int, modified: int) -> dict[str, dict[str, Any]]:
    runs = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            run = json.loads(line)
        except ValueError:
            continue  # its writer was killed
        runs[run["name"]] = run
    return runs


def append_run(run: dict[str, Any], file: Path = FILE) -> None:
    """Add a finished run; it is on the disk when this returns."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a+b") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        line = (json.dumps(run) + "\n").encode()
        if log.seek(0, os.SEEK_END):
            log.seek(-1, os.SEEK_END)
            if log.read(1) != b"\n":
                line = b"\n" + line
        log.write(line)
        log.flush()
        os.fsync(log.fileno())
