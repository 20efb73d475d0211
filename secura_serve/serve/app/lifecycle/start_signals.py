"""Stopping while vLLM is still starting, and what a stop does not say.

Once the server answers, :mod:`secura_serve.serve.app.lifecycle.draining` handles Ctrl-C and
SIGTERM. Before that vLLM's own handler raises an exception that a callback may swallow, or waits
for an engine that the same signal has ended; either way the server stays. Until then a signal here
ends everything.
"""

from __future__ import annotations

import os
import signal
from types import FrameType

from secura_serve.serve.logs import say

__all__ = ["end_at_once", "hide_leak_warnings", "stop_cleanly_during_start"]


def end_at_once(number: int, frame: FrameType | None = None) -> None:
    """End all child processes and this one, with status 128 + signal: a signal handler."""
    import psutil

    say("stopped while starting", prefix="\nsecura-serve: ", to_stderr=True)
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
    """Install the handlers; they are replaced when the server is up."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end_at_once)


def hide_leak_warnings() -> None:
    """Have Python's resource tracker remove in silence what a killed process left behind.

    Its warning would come after the last line, which gives the cause. To be called before anything
    starts the tracker, which reads this once.
    """
    ours = "ignore::UserWarning:multiprocessing.resource_tracker"
    before = os.environ.get("PYTHONWARNINGS")
    os.environ["PYTHONWARNINGS"] = f"{before},{ours}" if before else ours
