"""Stopping while vLLM is still starting.

Once it answers, vLLM handles Ctrl-C and SIGTERM itself. Before that its own handler raises an
exception that a callback may swallow, or waits for an engine that the same signal has ended;
either way the server stays. Until the event loop takes over, a signal here ends everything.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

__all__ = ["end_at_once", "stop_cleanly_during_start"]


def end_at_once(number: int, frame: FrameType | None = None) -> None:
    """Signal handler: end all child processes and this one, status 128 + signal."""
    import psutil

    print("\nsecura-serve: stopped while starting", file=sys.stderr, flush=True)
    for child in psutil.Process().children(recursive=True):
        try:
            # Python's trackers of shared memory end by themselves, once they have removed it.
            if not any("resource_tracker" in part for part in child.cmdline()):
                child.kill()
        except psutil.NoSuchProcess:
            continue
    # Not sys.exit: an exception would pass through whatever the start is waiting for.
    os._exit(128 + number)


def stop_cleanly_during_start() -> None:
    """Install the handlers; uvicorn replaces them when the server is up."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end_at_once)
