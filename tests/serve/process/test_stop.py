"""Proves that a server ends at once when it is told to, while it starts and while it serves, and
that what cannot work is told before the engine starts.

Needs vLLM on a CPU and the tiny bases. Signals go to the main process alone, as systemd and
containers send them.
"""

from __future__ import annotations

import signal
import socket
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from tests.support import warm
from tests.support.engines import SERVE, free_port, random_adapter

FLAGS = ("--enforce-eager", "--max-model-len", "256")


def _start(command, base, log, *flags):
    with log.open("w") as out:
        return subprocess.Popen(
            [*command, "--base", str(base), "--no-ui", *FLAGS, *flags],
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _wait_for(text, log, process):
    deadline = time.monotonic() + 400
    while text not in log.read_text(errors="replace"):
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.2)


def _shared(processes):
    """The files of shared memory that these processes have mapped; a server beside them has its
    own."""
    mapped = set()
    for process in processes:
        try:
            mapped |= {Path(entry.path) for entry in process.memory_maps()}
        except psutil.Error:
            continue
    return {p for p in mapped if p.parent == Path("/dev/shm") and p.stem != "sem" and p.exists()}


@pytest.mark.engine
@pytest.mark.parametrize(
    ("number", "moment", "status"),
    [
        (signal.SIGTERM, "Starting to load model", 128 + signal.SIGTERM),
        (signal.SIGINT, "starting; the endpoint", 128 + signal.SIGINT),
        # attack/test_processes.py checks the same under load, on a server that it has anyway.
        pytest.param(signal.SIGTERM, "is ready", 0, marks=pytest.mark.slow),
    ],
)
def test_a_signal_ends_every_process(number, moment, status, tiny_base, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "INFO")
    log = tmp_path / "log"
    # The earliest moment on a command that starts from nothing, the later ones after its imports.
    command = SERVE if moment.startswith("starting") else _warm()
    process = _start(command, tiny_base("llama"), log, "--port", str(free_port()))
    _wait_for(moment, log, process)
    server = psutil.Process(warm.pid(process))
    family = server.children(recursive=True)
    if status:
        # The start waits for them here, and does not end while the files below are looked for.
        for worker in (p for p in family if "Worker" in p.name()):
            worker.suspend()
    shared = _shared([server, *family])
    process.send_signal(number)
    assert process.wait(timeout=60) == status, log.read_text()[-3000:]
    _, alive = psutil.wait_procs(family, timeout=30)
    assert not [p for p in alive if p.status() != psutil.STATUS_ZOMBIE]
    # 400 MB of it, which stays until the machine is restarted. The tracker removes it in the end.
    deadline = time.monotonic() + 15
    while (left := [p for p in shared if p.exists()]) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert left == []


def _warm():
    """The command with vLLM imported."""
    return [warm.python("serve"), SERVE[1]]


@pytest.mark.long
@pytest.mark.parametrize("flag", ["--port", "--ui-port"])
def test_a_taken_port_is_told_before_the_engine_starts(flag, tiny_base, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        command = [*_warm(), "--base", str(tiny_base("llama")), flag, str(taken.getsockname()[1])]
        command += ["--no-ui"] if flag == "--port" else ["--port", str(free_port())]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert "cannot listen on 127.0.0.1" in done.stderr and flag in done.stderr
    assert "is ready" not in done.stdout and "Traceback" not in done.stderr


@pytest.mark.long
def test_page_and_endpoint_on_one_port_are_refused(tiny_base):
    command = [*_warm(), "--base", str(tiny_base("llama")), "--port", "18473", "--ui-port", "18473"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2 and "is the port of the endpoint, too" in done.stderr, done.stderr


@pytest.mark.long
def test_a_flag_that_vllm_does_not_know_gets_one_line(tiny_base):
    command = [*_warm(), "--base", str(tiny_base("llama")), "--no-ui", "--bogus-flag", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert "secura-serve: error: unrecognized arguments: --bogus-flag" in done.stderr
    assert "usage:" not in done.stderr


@pytest.mark.long
@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--pipeline-parallel-size", "2"), "pipeline stages"),
        (("--api-server-count", "2"), "known to one server process"),
        (("--fully-sharded-loras", "--lora-modules", "a=b"), "--adapters instead"),
    ],
)
def test_what_adapters_do_not_go_with_is_told_before_the_engine_starts(
    flags, said, tiny_base, tmp_path
):
    base = tiny_base("llama")
    random_adapter(base, tmp_path / "adapters" / "one", r=4, seed=1)
    command = [*_warm(), "--base", str(base), "--adapters", str(tmp_path / "adapters"), "--no-ui"]
    done = subprocess.run(
        [*command, *flags], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 2 and said in done.stderr, done.stderr[-2000:]
    assert "Traceback" not in done.stderr and "starting; the endpoint" not in done.stdout
