"""A client that stops reading its answer is dropped after a while.

Otherwise it would hold its request for ever, and with it whoever waits for running requests to
finish: a fold, or the stop of the server. The limit sits below HTTP, where asyncio tells that a
connection takes no more bytes; answers that are read cost nothing.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

__all__ = ["http_protocol"]


def http_protocol(seconds: float) -> type[asyncio.Protocol]:
    """Return uvicorn's HTTP protocol with a write deadline.

    Args:
        seconds: how long a full connection may take to become writable again; it is then reset.
    """
    base: Any = AutoHTTPProtocol

    class WriteDeadline(base):  # type: ignore[misc, unused-ignore]
        """Resets a connection whose client does not read."""

        transport: asyncio.Transport
        _deadline: asyncio.TimerHandle | None = None

        def pause_writing(self) -> None:
            super().pause_writing()
            if self._deadline is None:
                loop = asyncio.get_running_loop()
                self._deadline = loop.call_later(seconds, self.transport.abort)

        def resume_writing(self) -> None:
            self._forget_deadline()
            super().resume_writing()

        def connection_lost(self, exc: Exception | None) -> None:
            self._forget_deadline()
            super().connection_lost(exc)

        def _forget_deadline(self) -> None:
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None

    return WriteDeadline
