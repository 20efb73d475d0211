"""A thread that reads answers and does nothing else.

Whatever the page does beside it, such as drawing, would come between a token and its time.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from functools import cache
from typing import Any

__all__ = ["Reader", "reader"]


class Reader:
    """An event loop in a thread of its own, which ends with the process."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="answers", daemon=True).start()

    def start(self, work: Coroutine[Any, Any, None]) -> Future[None]:
        """Run a coroutine there."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def call(self, function: Callable[[], object]) -> None:
        """Call a function there, behind what was started or called before."""
        self._loop.call_soon_threadsafe(function)


@cache
def reader() -> Reader:
    """Return the one of this process."""
    return Reader()
