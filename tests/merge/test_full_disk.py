"""Proves that a disk that fills up under secura-merge or secura-train costs an error and no more.

No simulation: the output goes to a small tmpfs, and a neighbour takes all the space that is left
at one step of the merge, so that it is the kernel who refuses. Needs a user or a container that
may mount (`unshare`); skipped with the reason elsewhere. As a script: those merges, one report.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support import ROOT
from tests.support.merging import at_step, make_adapter, reshard
from tests.support.training import PAIRS, command, flags, write

# In a namespace of its own: the disk is seen by these processes only, and goes when they end.
MOUNTED = 'mount -t tmpfs -o size="$1" none "$2" && shift 2 && exec "$@"'


def on_small_disk(disk: Path, size: str, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a command that finds a new tmpfs of ``size`` at ``disk``."""
    shell = ["unshare", "--map-root-user", "--mount", "sh", "-c", MOUNTED, "sh"]
    argv = [*shell, size, str(disk), *command]
    return subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """Where a small disk may be mounted."""
    if shutil.which("unshare") is None:
        pytest.skip("no `unshare` here")
    (tmp_path / "disk").mkdir()
    tried = on_small_disk(tmp_path / "disk", "1m", "true")
    if tried.returncode:
        pytest.skip(f"nothing can be mounted here: {tried.stderr.strip()}")
    return tmp_path / "disk"


@pytest.mark.long
def test_a_checkpoint_that_finds_no_room(
    tiny_base: Callable[[str], Path], tmp_path: Path, disk: Path
) -> None:
    data = write(tmp_path / "d.jsonl", PAIRS)
    argv = flags(tiny_base("llama"), data, tmp_path / "out", "--save-steps", "2")
    done = on_small_disk(disk, "40k", *command(*argv, "--run-dir", str(disk / "run")))
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "the checkpoint of step 2 could not be written" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.long
def test_a_base_that_finds_no_room_at_first_use(tmp_path: Path, disk: Path) -> None:
    pytest.importorskip("gguf")
    adapter = ROOT / "adapters" / "iso-date"
    flags = ("--base", "smollm2-135m", "--adapter", str(adapter), "--out", str(tmp_path / "out"))
    python = ("env", f"SECURA_CACHE={disk}", sys.executable, "-c")
    code = "from secura_serve.cli import merge; merge()"
    done = on_small_disk(disk, "20m", *python, code, *flags)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "No space left" in done.stderr and "SECURA_CACHE" in done.stderr


@pytest.mark.long
def test_a_disk_that_fills_up(tiny_base: Callable[[str], Path], tmp_path: Path, disk: Path) -> None:
    base = reshard(tiny_base("llama"), tmp_path / "base", 2)
    adapter = make_adapter(base, tmp_path / "a", only=("q_proj", "up_proj"))
    flags = ("--base", str(base), "--adapter", str(adapter), "--out", str(disk / "out"))
    done = on_small_disk(disk, "16m", sys.executable, "-m", __name__, *flags)
    assert done.returncode == 0, done.stderr
    early, *refused, last = json.loads(done.stdout)
    # What does not fit from the start is refused before the first byte.
    assert early["status"] == 1 and early["left"] == []
    assert "MiB free, the output needs" in early["said"]
    assert len(refused) >= 5
    for run in refused:
        assert run["status"] == 1, run
        assert run["said"].count("\n") == 1 and "No space left on device" in run["said"], run
        assert "Check the free space" in run["said"] and run["left"] == [], run
    # The disk filled up when everything had been written.
    assert last == {"status": 0, "said": "", "left": ["out"]}


def _merge_while_it_fills(flags: list[str], out: Path) -> None:
    """Merges with the disk full before, then at later and later steps, until one comes through."""
    from secura_serve.merge import main, write  # noqa: F401 - what the children need

    ballast, runs = out.parent / "ballast", []

    def fill() -> None:
        with ballast.open("ab", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(2**20))
            except OSError:  # full
                return

    def child(step: int, stderr: int) -> int:
        os.dup2(stderr, 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if step < 0:
            fill()
        at_step(step, fill, lambda name, call: setattr(os, name, call))
        return main.main(flags)

    status: Any = None
    with open(out.parent.with_name("stderr"), "w+") as stderr:
        for step in range(-1, 1000, 5):
            stderr.seek(0)
            stderr.truncate()
            # Forked from a process that has torch loaded: a merge costs a tenth of a second.
            if not (pid := os.fork()):
                os._exit(child(step, stderr.fileno()))
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            ballast.unlink(missing_ok=True)
            stderr.seek(0)
            left = sorted(p.name for p in out.parent.iterdir())
            runs.append({"status": status, "said": stderr.read(), "left": left})
            if status == 0:
                break
    print(json.dumps(runs))


if __name__ == "__main__":
    _merge_while_it_fills(sys.argv[1:], Path(sys.argv[-1]))
