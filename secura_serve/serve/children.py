"""What vLLM's own processes do differently once ``secura-serve`` has started them.

The server starts the engine process, and that one starts a worker per rank. :func:`prepare` runs
in each of them, through the plugin that vLLM loads everywhere. It sees to three things:

* The process ends when the one that started it is gone, however that one ended. The engine would
  otherwise wait for ever for messages from a server that was killed. The standard library's
  ``parent_process().sentinel`` tells: a pipe whose other end the kernel closes with the parent. The
  kernel's parent-death signal (``PR_SET_PDEATHSIG``) was not chosen, since it fires already when
  the *thread* that started the process ends, and exists on Linux only.
* A Ctrl-C, which a terminal sends to the whole group, is left to the server, and so is a SIGTERM
  that a service manager sends to workers: the server lets running requests finish first.
* The first error of a burst is left in a file, so that the server can say what its engine died of.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import time
from multiprocessing.connection import wait
from pathlib import Path

__all__ = ["REPORTS", "ErrorReport", "prepare"]

REPORTS = "SECURA_SERVE_REPORTS"
"""Environment variable set by ``secura-serve``: the folder for error reports. Without it vLLM's
processes stay as they are."""

# Errors closer together than this have one cause: the first of them.
_BURST_S = 5.0


def prepare() -> None:
    """Prepare this process if the server started it, itself or through the engine process."""
    parent = multiprocessing.parent_process()
    reports = os.environ.get(REPORTS)
    if parent is None or not reports or _Prepared.done:
        return
    _Prepared.done = True
    threading.Thread(
        target=_end_with, args=(parent.sentinel,), name="end-with-parent", daemon=True
    ).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # The engine process drains on SIGTERM, and the server ends it so. A worker would stop in the
    # middle of a step; it follows its engine process by a pipe of vLLM's.
    if multiprocessing.current_process().daemon:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    name = multiprocessing.current_process().name
    logging.getLogger("vllm").addHandler(ErrorReport(Path(reports), name))


class _Prepared:
    """vLLM may load plugins more than once in a process."""

    done = False


def _end_with(sentinel: int) -> None:
    """Wait for the parent's end, then end this process at once.

    SIGKILL, since vLLM's SIGTERM waits for an answer from the parent. Shared memory is removed by
    Python's resource tracker, which outlives both.
    """
    wait([sentinel])
    os.kill(os.getpid(), signal.SIGKILL)


class ErrorReport(logging.Handler):
    """Keeps the first error of the latest burst in ``folder/<pid>``, as one line.

    Args:
        folder: where the server looks for it.
        name: what to call this process there.
    """

    def __init__(self, folder: Path, name: str) -> None:
        super().__init__(logging.ERROR)
        self._file, self._name = folder / str(os.getpid()), name
        self._last = -_BURST_S

    def emit(self, record: logging.LogRecord) -> None:
        """Write the record down, unless it follows another one closely."""
        now = time.monotonic()
        first, self._last = now - self._last >= _BURST_S, now
        if not first:
            return
        try:
            text = record.getMessage()
            if record.exc_info and record.exc_info[1] is not None:
                error = record.exc_info[1]
                text = f"{text} {type(error).__name__}: {error}"
            self._file.write_text(f"{self._name}: {' '.join(text.split())}", encoding="utf-8")
        except Exception:
            self.handleError(record)
