"""Python processes that need not import torch, transformers or vLLM once more.

Most tests that start a command wait 4 to 8 seconds for its imports. :func:`python` returns an
executable that is used like ``sys.executable`` (``-c``, ``-m`` or a script). It hands its
arguments, environment and open files to a process of the test session that has imported them, and
that one forks. Signals and the exit status are passed on, a ``kill -9`` too. Where the environment
differs in what libraries read when they are imported, and on systems other than Linux, it is
``sys.executable``.

What runs is the same code in a process of its own. How a command starts from nothing is left to
tests/serve/process/test_default_start.py, tests/package/test_cli.py, one case of test_stop.py and
most of tests/attack/test_processes.py, which do not use this.
"""

from __future__ import annotations

import array
import atexit
import contextlib
import gc
import importlib
import json
import logging
import os
import random
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import types
from functools import cache
from pathlib import Path
from typing import Any

from secura_serve.system.garbage_collection import exit_without_collecting

# What is imported at the first command that has the word in it.
GROUPS = {
    "serve": {
        "secura": (
            *("vllm.v1.engine.core", "vllm.v1.executor.multiproc_executor"),
            *("vllm.v1.worker.cpu_worker", "vllm.entrypoints.openai.api_server"),
            *("secura_serve.serve.console", "secura_serve.serve.app.start"),
        ),
    },
    "tools": {
        "train": (
            *("secura_serve.train.run", "secura_serve.train.loop.trainer", "peft", "datasets"),
            *("matplotlib.backends.backend_agg", "matplotlib.figure"),
        ),
        "eval": (
            *("secura_serve.evaluate.main", "secura_serve.evaluate", "peft", "transformers"),
            *("matplotlib.backends.backend_agg", "matplotlib.figure", "openai"),
        ),
        "merge": ("secura_serve.merge.main", "secura_serve.merge"),
        "demo": ("gradio", "openai"),
        "StateFile": (
            *("secura_serve.serve.app.adapters.library", "secura_serve.serve.app.adapters.state"),
            *("secura_serve.serve.app.adapters.content.uploaded", "tests.support.lifecycle"),
        ),
        "openai": ("openai", "openai.types.chat", "openai.resources.chat"),
        "peft": ("peft",),
        "transformers": ("transformers",),
        "": ("torch", "numpy", "safetensors.torch", "secura_serve"),
    },
}
_MAY_DIFFER = {
    # Read each time, not once: a command may be given others.
    *("PATH", "PWD", "OLDPWD", "SHLVL", "_", "PYTHONPATH", "TMPDIR", "PYTEST_CURRENT_TEST"),
    *("TORCHINDUCTOR_CACHE_DIR", "OPENAI_API_KEY", "COVERAGE_PROCESS_START"),
    # The size of the terminal, which readline writes into the environment.
    *("VLLM_ENABLE_RESPONSES_API_STORE", "COLUMNS", "LINES"),
    # Read when vLLM is imported, but set again by _become.
    "VLLM_LOGGING_LEVEL",
    # Set by vLLM when it is imported, in this process as in the others.
    *("TRITON_CACHE_AUTOTUNING", "LD_LIBRARY_PATH", "KMP_DUPLICATE_LIB_OK", "KMP_INIT_AT_FORK"),
    *("TILELANG_CLEANUP_TEMP_FILES", "AITER_SITUV2_A4W4", "PYTORCH_NVML_BASED_CUDA_CHECK"),
}
_SHIM = """#!{python} -IS
import os, socket, sys
environ, differs = {environ!r}, {differs!r}
changed = {{n for n in environ.keys() | os.environ.keys() if environ.get(n) != os.environ.get(n)}}
cold = any(n not in differs and not n.startswith("SECURA_") for n in changed)
# A command with a file system of its own, such as a small disk.
cold |= os.readlink("/proc/self/ns/mnt") != {mounts!r}
if cold:
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
import array, json, signal
made = socket.socket(socket.AF_UNIX)
made.connect({address!r})
request = dict(argv=sys.argv[1:], environ=dict(os.environ), cwd=os.getcwd(), umask=os.umask(0),
               session=os.getsid(0) == os.getpid(), shim=os.getpid())
body = json.dumps(request).encode()
fds = array.array("i", [0, 1, 2]).tobytes()
made.sendmsg([len(body).to_bytes(4, "big")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])
made.sendall(body)
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, frame: made.send(bytes([number])))
status = made.recv(4)
if len(status) < 4:
    sys.exit("the process that had imported is gone")
status = int.from_bytes(status, "big", signed=True)
if status < 0:
    signal.signal(-status, signal.SIG_DFL) if -status != signal.SIGKILL else None
    os.kill(os.getpid(), -status)
os._exit(status)
"""


def python(group: str = "tools") -> str:
    """Return what to run in place of ``sys.executable``.

    Args:
        group: ``serve`` for ``secura-serve``, ``tools`` for everything else.
    """
    return _start(group) if sys.platform == "linux" else sys.executable


def _folder() -> Path:
    """A new folder that goes with the test session."""
    folder = tempfile.mkdtemp(prefix="warm-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


@cache
def _start(group: str) -> str:
    folder = _folder()
    # Not what torch or vLLM have set in this process.
    unset = ("TORCHINDUCTOR_CACHE_DIR", "PYTEST_CURRENT_TEST")
    environ = {name: value for name, value in os.environ.items() if name not in unset}
    address = str(folder / "socket")
    root = Path(__file__).resolve().parents[2]
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen(16)
        os.set_inheritable(listener.fileno(), True)
        process = subprocess.Popen(
            [sys.executable, "-m", __name__, group, str(listener.fileno())],
            cwd=root, env=environ, pass_fds=[listener.fileno()], stdin=subprocess.DEVNULL,
        )  # fmt: skip
    atexit.register(process.kill)
    shim = folder / "python"
    text = _SHIM.format(
        python=sys.executable, environ=environ, differs=_MAY_DIFFER, address=address,
        mounts=os.readlink("/proc/self/ns/mnt"),
    )  # fmt: skip
    shim.write_text(text)
    shim.chmod(0o755)
    return str(shim)


@cache
def commands() -> str:
    """Return a folder with ``python`` and the ``secura-…`` commands, to be put first in PATH.

    Without ``secura-serve``, which is to be started with another group.
    """
    shim = Path(python())
    folder = _folder()
    (folder / "python").symlink_to(shim)
    for script in Path(sys.executable).parent.glob("secura-*"):
        if script.name != "secura-serve":
            (folder / script.name).write_text(f'#!/bin/sh\nexec "{shim}" "{script}" "$@"\n')
            (folder / script.name).chmod(0o755)
    return str(folder)


def pid(process: subprocess.Popen[Any]) -> int:
    """Return the id of the process that runs a command, once that has begun."""
    file = _real(Path(process.args[0]), process.pid)  # type: ignore[index]
    return int(file.read_text()) if file.exists() else process.pid


def kill(process: subprocess.Popen[Any]) -> None:
    """Kill -9 a command and wait until it is gone: it is passed on a moment later."""
    process.kill()
    process.wait(60)
    file = _real(Path(process.args[0]), process.pid)  # type: ignore[index]
    deadline = time.monotonic() + 60
    while file.exists() and Path(f"/proc/{file.read_text()}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _real(beside: Path, pid: int) -> Path:
    """Where it is written which process runs what the one that was started stands for."""
    return beside.with_name(f"{pid}.pid")


class _Begin(BaseException):
    """In the forked process: leave the loop, and run this."""

    def __init__(self, request: dict[str, Any]) -> None:
        self.request = request


def _serve(group: str, listener: socket.socket) -> None:
    """Fork for every request until the test session ends."""
    parent = os.getppid()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while os.getppid() == parent:
        if not select.select([listener], [], [], 5)[0]:
            continue
        made, _ = listener.accept()
        request, fds = _receive(made)
        _import(group, " ".join(request["argv"]))
        if os.fork() == 0:
            listener.close()
            _watch(made, request, fds)
        made.close()
        for fd in fds:
            os.close(fd)


def _import(group: str, command: str) -> None:
    for word, names in GROUPS[group].items():
        if word in command:
            for name in names:
                importlib.import_module(name)
            if group == "serve":
                _sleep_while_waiting()
    # Not written to by a collection, so that it stays shared.
    gc.freeze()


def _sleep_while_waiting() -> None:
    """Have vLLM's processes wait for each other in small sleeps.

    Between two requests, or two steps, a worker asks for its next step without a pause for up to a
    second, and the engine for the end of the step that runs: the tests beside them would lack
    these cores.
    """
    from vllm.distributed.device_communicators import shm_broadcast

    shm_broadcast.sched_yield = lambda: time.sleep(0.0003)


def _receive(made: socket.socket) -> tuple[dict[str, Any], list[int]]:
    size, ancillary, _, _ = made.recvmsg(4, socket.CMSG_SPACE(3 * 4))
    fds = array.array("i", ancillary[0][2])
    body = b""
    while len(body) < int.from_bytes(size, "big"):
        body += made.recv(65536)
    return json.loads(body), list(fds)


def _watch(made: socket.socket, request: dict[str, Any], fds: list[int]) -> None:
    """Fork the process itself, pass signals on to it and its status back."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    pid = os.fork()
    if pid == 0:
        made.close()
        _become(request, fds)
        raise _Begin(request)
    for fd in fds:
        os.close(fd)
    _real(Path(made.getsockname()), request["shim"]).write_text(str(pid))
    ended, left = os.pidfd_open(pid), False
    while ended not in (ready := select.select([ended, *([] if left else [made])], [], [])[0]):
        number = made.recv(1) if made in ready else b""
        left = not number
        os.kill(pid, number[0] if number else signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    with contextlib.suppress(OSError):
        made.sendall(os.waitstatus_to_exitcode(status).to_bytes(4, "big", signed=True))
    os._exit(0)


def _become(request: dict[str, Any], fds: list[int]) -> None:
    """Take the files, the folder and the environment of whoever asked."""
    if request["session"]:
        os.setsid()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, fd in enumerate(fds):
        os.dup2(fd, number)
        os.close(fd)
    os.chdir(request["cwd"])
    os.umask(request["umask"])
    # What importing has set is there in a process of its own, too.
    imported = {n: v for n, v in os.environ.items() if n not in _Environment.before}
    imported.pop("TORCHINDUCTOR_CACHE_DIR", None)
    os.environ.clear()
    os.environ.update(imported | request["environ"])
    log = logging.getLogger("vllm")
    for one in (log, *log.handlers):
        one.setLevel(os.environ.get("VLLM_LOGGING_LEVEL", "INFO"))
    random.seed()


class _Environment:
    before: dict[str, str] = {}


def _run(request: dict[str, Any]) -> None:
    """Run what the arguments of ``python`` say."""
    argv = list(request["argv"])
    path = [p for p in request["environ"].get("PYTHONPATH", "").split(os.pathsep) if p]
    sys.path[:] = [*path, *(p for p in sys.path[1:] if p not in path)]
    if argv[0] == "-m":
        sys.argv = argv[1:]
        sys.path.insert(0, request["cwd"])
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
    elif argv[0] == "-c":
        sys.argv = ["-c", *argv[2:]]
        sys.path.insert(0, "")
        sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(argv[1], "<string>", "exec"), vars(sys.modules["__main__"]))
    else:
        sys.argv = argv
        sys.path.insert(0, str(Path(argv[0]).parent))
        runpy.run_path(argv[0], run_name="__main__")


if __name__ == "__main__":
    # It finds what `ps` shows beside the environment, as long as nothing has changed that.
    with contextlib.suppress(ImportError):
        importlib.import_module("setproctitle").getproctitle()
    _Environment.before = dict(os.environ)
    # Nothing of what was imported is taken apart at the end of a command.
    exit_without_collecting()
    try:
        _serve(sys.argv[1], socket.socket(fileno=int(sys.argv[2])))
        sys.exit(0)
    except _Begin as begin:
        wanted = begin.request
    _run(wanted)
