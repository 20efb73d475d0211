"""When Python's cyclic garbage collector runs, from the start of a process to its end.

Importing torch, transformers and vLLM makes some two million objects. At its usual thresholds the
collector walks through them again and again while they are made, and once more at the exit, and
finds nothing: 3 of 10 seconds of vLLM's import and 2.3 of 2.6 seconds of the exit (vLLM 0.32). A
server has three such processes, which start and end one after the other.
"""

from __future__ import annotations

import atexit
import gc
import os
import sys

__all__ = ["collect_as_usual", "collect_rarely", "exit_without_collecting"]

_USUAL = gc.get_threshold()


def collect_rarely() -> None:
    """Collect rarely until :func:`collect_as_usual`."""
    gc.set_threshold(100_000, 50, 100)


def collect_as_usual() -> None:
    """Collect as Python does by default: a cycle may hold a large tensor."""
    gc.set_threshold(*_USUAL)


def exit_without_collecting() -> None:
    """Let what is in cycles go with the process.

    Triton's bindings (nanobind) call that a leak, from a destructor and in hundreds of lines, so
    nothing that is written to stderr after Python's last exit handler is shown.
    """
    # The first to be registered is the last to be called.
    atexit.register(_freeze)


def _freeze() -> None:
    gc.freeze()
    sys.stderr.flush()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
