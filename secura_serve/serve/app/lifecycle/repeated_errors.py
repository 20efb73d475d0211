"""A client cannot fill the log: what vLLM says about unknown model names is limited."""

from __future__ import annotations

import logging
import time

__all__ = ["RepeatedErrors", "limit_repeated_errors"]

_UNKNOWN_MODEL = "Error with model"
_ALLOWED, _PERIOD_S = 5, 60.0


class RepeatedErrors(logging.Filter):
    """Passes the first few records of a kind per period, then one that counts the others.

    Args:
        beginning: of the messages that are meant.
        allowed: how many pass in ``period`` seconds.
    """

    def __init__(self, beginning: str, allowed: int, period: float) -> None:
        super().__init__()
        self._beginning, self._allowed, self._period = beginning, allowed, period
        self._since, self._count = 0.0, 0

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether to write the record."""
        if not str(record.msg).startswith(self._beginning):
            return True
        now = time.monotonic()
        dropped = max(0, self._count - self._allowed)
        if now - self._since >= self._period:
            self._since, self._count = now, 0
            if dropped:
                record.msg = f"{record.msg} ({dropped} like it were left out before)"
        self._count += 1
        if self._count == self._allowed:
            record.msg = f"{record.msg} (more like it are left out for {self._period:g} s)"
        return self._count <= self._allowed


def limit_repeated_errors() -> None:
    """Limit vLLM's error about an unknown model name; a request for one still gets its 404."""
    only = RepeatedErrors(_UNKNOWN_MODEL, _ALLOWED, _PERIOD_S)
    for handler in logging.getLogger("vllm").handlers:
        handler.addFilter(only)
