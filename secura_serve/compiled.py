"""Small libraries in C and C++, compiled at first use for the processor at hand and kept.

A library that was made from the same source, with the same flags, by the same compiler, for the
same processor is used again. Code is not run because somebody left it in a shared folder.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

__all__ = ["FAILURES", "compiled"]

FAILURES = (OSError, RuntimeError, ValueError, subprocess.SubprocessError)
"""What :func:`compiled` raises where there is no compiler or it fails."""


def compiled(
    source: Path, flags: Sequence[str], *, compiler: str = "cc", links: Sequence[str] = ()
) -> Path:
    """The shared library made of ``source``, made if it is not there.

    Args:
        compiler: ``cc`` or ``c++``; ``$CC`` and ``$CXX`` win.
        links: what follows the source on the command line, for instance ``-lm``.
    """
    chosen = os.environ.get({"cc": "CC", "c++": "CXX"}[compiler]) or compiler
    command = shlex.split(chosen)
    made_of = (source.read_text("utf-8"), *flags, *links, _run(*command, "--version"), _processor())
    key = hashlib.sha256("\0".join(made_of).encode()).hexdigest()[:16]
    # As in secura_serve.bases, which the rooms that compile do not know.
    root = Path(os.environ.get("SECURA_CACHE") or "~/.cache/secura-serve").expanduser()
    file = root / "native" / f"{key}.so"
    if not file.is_file() or file.stat().st_uid not in (0, os.getuid()):
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".", dir=file.parent) as work:
            new = Path(work) / file.name
            _run(*command, *flags, "-o", str(new), str(source), *links)
            # Several processes may get here at once: each puts the same thing in place.
            new.replace(file)
    return file


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


def _processor() -> str:
    """What ``-march=native`` looks at."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    features = (line for line in lines if line.startswith(("flags", "Features")))
    return f"{platform.machine()} {next(features, platform.processor())}"
