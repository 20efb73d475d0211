"""When Python's cyclic garbage collector runs, from the start of a process to its end.

Importing vLLM makes some two million objects. At its usual thresholds the collector walks through
them again and again while they are made, and once more at the exit, and finds nothing: 3 of 10
seconds of the import and 2.3 of 2.6 seconds of the exit (vLLM 0.32). A server has three such
processes, which start and end one after the other.
"""

from __future__ import annotations

import atexit
import gc
import os
import sys

__all__ = ["collect_as_usual", "collect_rarely"]

_USUAL = gc.get_threshold()


def collect_rarely() -> None:
    """Collect rarely until :func:`collect_as_usual`, and not at the exit."""
    gc.set_threshold(100_000, 50, 100)
    # The first to be registered is the last to be called.
    atexit.register(_leave_to_the_system)


def collect_as_usual() -> None:
    """Collect as Python does by default: a cycle may hold a large tensor."""
    gc.set_threshold(*_USUAL)


def _leave_to_the_system() -> None:
    """Let what is in cycles go with the process, and let nobody call that a leak on stderr.

    Triton's bindings (nanobind) do, from a destructor and in hundreds of lines.
    """
    gc.freeze()
    sys.stderr.flush()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
