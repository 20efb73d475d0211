"""Whether the engine is alive, and what it died of."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import tempfile
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from secura_serve.serve.children import REPORTS

__all__ = ["EngineHealth"]

# An engine that fails needs a moment to fall apart; an older error was survived.
_RECENT_S = 30.0
_LONGEST = 600


class EngineHealth:
    """Follows vLLM's processes from outside. Context manager: owns the folder of error reports."""

    def __init__(self) -> None:
        self._engine: Any = None
        self._processes: list[BaseProcess] = []
        self._folder: Path | None = None

    def __enter__(self) -> EngineHealth:
        self._folder = Path(tempfile.mkdtemp(prefix="secura-serve-"))
        os.environ[REPORTS] = str(self._folder)
        return self

    def __exit__(self, *_: object) -> None:
        os.environ.pop(REPORTS, None)
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def follow(self, engine: Any) -> None:
        """Take hold of the engine once it is there.

        Args:
            engine: vLLM's ``EngineClient``.
        """
        self._engine = engine
        self._processes = list(multiprocessing.active_children())

    @property
    def dead(self) -> bool:
        """Whether the engine can no longer answer."""
        return self._engine is not None and bool(self._engine.errored)

    @property
    def ended_in_order(self) -> bool:
        """Whether every engine process has ended by itself and without an error."""
        return all(process.exitcode == 0 for process in self._processes)

    def cause(self) -> str:
        """Return what the engine died of, in one line: its first error, or how its process left."""
        return self.reported() or self._exit_status() or "its process ended"

    def reported(self) -> str | None:
        """Return the first recent error of any of vLLM's processes, if there is one."""
        now = time.time()
        reports = []
        for file in self._folder.glob("*") if self._folder is not None else ():
            written = file.stat().st_mtime
            if now - written <= _RECENT_S:
                reports.append((written, file.read_text(encoding="utf-8")))
        return min(reports)[1][:_LONGEST] if reports else None

    def _exit_status(self) -> str | None:
        for process in self._processes:
            status = process.exitcode
            if status is None or status == 0:
                continue
            if status < 0:
                how = f"was ended by {signal.Signals(-status).name}"
                how += " (out of memory?)" if status == -signal.SIGKILL else ""
            else:
                how = f"ended with status {status}"
            return f"{process.name} (process {process.pid}) {how}"
        return None
