"""The process that vLLM's own are forked from: what is forked is what would have been spawned.

With the standard library's modules in place of vLLM's imports, in a program of its own each time.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from secura_serve.serve import fork_server

HEAD = """
import os, signal, sys, time
from secura_serve.serve import fork_server

fork_server._IMPORTED = ("json",)
fork_server.compat.start_processes_by = lambda context: None
fork_server.compat.name_process = lambda name: None

class Reads:
    # As vLLM's settings do, which read the environment while they are unpickled.
    def __reduce__(self):
        return os.getenv, ("SHOWN", "nothing")

def show(read=None):
    import torch
    parent = "spawned" if os.getppid() == int(os.environ["SERVER"]) else "forked"
    handled = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    cores = sorted(os.sched_getaffinity(0))
    print(parent, read, torch.get_num_threads(), cores, handled, flush=True)

def run(target, *args):
    made = fork_server.Context().Process(target=target, args=args)
    made.start()
    made.join()
    return made.exitcode

def fail():
    sys.exit(3)

def end():
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)

def again():
    print(run(show), flush=True)

def main():
    os.environ["SERVER"] = str(os.getpid())
    fork_server._READ_LATER |= {"SHOWN", "SERVER"}
    assert fork_server.start()
    fork_server.use()
"""
TAIL = """

if __name__ == "__main__":
    main()
"""


def run(tmp_path: Path, lines: str) -> list[str]:
    """Run a program whose main ends with ``lines``; what it has printed, a line each."""
    script = tmp_path / "program.py"
    script.write_text(HEAD + "".join(f"    {line}\n" for line in lines.splitlines()) + TAIL)
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=120, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "2"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_what_is_forked_is_as_if_spawned(tmp_path: Path):
    cores = sorted(os.sched_getaffinity(0))
    shown = run(
        tmp_path,
        "os.environ['SHOWN'] = 'later'\n"
        "run(show, Reads())\n"
        # A worker with one thread, which OpenMP would tie to a core.
        f"os.environ |= {{'OMP_NUM_THREADS': '1', 'GOMP_CPU_AFFINITY': '{cores[-1]}'}}\n"
        "run(show)\n"
        "print(run(fail), run(end), run(again))",
    )
    assert shown[0] == f"forked later 2 {cores} True"
    assert shown[1] == f"forked None 1 [{cores[-1]}] True"
    # What was forked forks by the same server; its parent is that one, too.
    assert shown[2:] == [f"forked None 1 [{cores[-1]}] True", "0", "3 -15 0"]


@pytest.mark.long
def test_what_libraries_read_at_import_is_spawned(tmp_path: Path):
    shown = run(
        tmp_path,
        "os.environ['UNKNOWN'] = '1'\n"
        "run(show)\n"
        "del os.environ['UNKNOWN']\n"
        "run(show)\n"
        "os.environ |= {'OMP_NUM_THREADS': '3', 'GOMP_CPU_AFFINITY': '0 1 2'}\n"
        "run(show)",
    )
    assert [line.split()[0] for line in shown] == ["spawned", "forked", "spawned"]


def test_it_ends_with_the_process_that_started_it(tmp_path: Path):
    (pid,) = run(tmp_path, "print(fork_server._SERVER._forkserver_pid)")
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid), 0)


@pytest.mark.parametrize(
    ("variable", "value"),
    [(fork_server.METHOD, "spawn"), ("LD_PRELOAD", "/usr/lib/libiomp5.so")],
)
def test_it_is_left_out_where_it_would_not_be_the_same(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str
):
    # vLLM sets both in a process that has configured an engine.
    for name in (fork_server.METHOD, "LD_PRELOAD"):
        monkeypatch.delenv(name, raising=False)
    assert fork_server.can_fork(["--port", "9000"])
    assert not fork_server.can_fork(["--numa-bind"])
    monkeypatch.setenv(variable, value)
    assert not fork_server.can_fork([])
