"""Small libraries in C and C++, compiled at first use for the processor at hand and kept.

A library is used again if source, headers, flags, compiler and processor are the same, and if
its file belongs to this user or to root: others may be able to write to a shared cache folder.
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

from secura_serve.errors import ConfigError

__all__ = ["FAILURES", "HALF_PRECISION", "compiled", "native_is_wanted"]

_ON, _OFF = ("1", "true", "on"), ("0", "false", "off")

FAILURES = (OSError, RuntimeError, ValueError, subprocess.SubprocessError)
"""What :func:`compiled` raises where there is no compiler or it fails."""


HALF_PRECISION = Path(__file__).with_name("half_precision.h")
"""Conversions of bfloat16 and float16, which several of the libraries include."""


def native_is_wanted() -> bool:
    """Return whether compiled code may be used: unless ``SECURA_NATIVE`` switches it off.

    Raises:
        ConfigError: the variable says neither on nor off.
    """
    value = os.environ.get("SECURA_NATIVE") or _ON[0]
    if value.lower() not in (*_ON, *_OFF):
        raise ConfigError(f"SECURA_NATIVE={value}: allowed: {', '.join((*_ON, *_OFF))}")
    return value.lower() in _ON


def compiled(
    source: Path,
    flags: Sequence[str],
    *,
    compiler: str = "cc",
    links: Sequence[str] = (),
    headers: Sequence[Path] = (),
) -> Path:
    """Return the path of the shared library made of ``source``, compiling it where needed.

    Args:
        compiler: ``cc`` or ``c++``; ``$CC`` and ``$CXX`` win.
        links: what follows the source on the command line, for instance ``-lm``.
        headers: files of this package that the source includes by name.
    """
    chosen = os.environ.get({"cc": "CC", "c++": "CXX"}[compiler]) or compiler
    command = shlex.split(chosen)
    texts = [file.read_text("utf-8") for file in (source, *headers)]
    made_of = (*texts, *flags, *links, _run(*command, "--version"), _processor())
    key = hashlib.sha256("\0".join(made_of).encode()).hexdigest()[:16]
    includes = [f"-I{folder}" for folder in sorted({str(file.parent) for file in headers})]
    # As in secura_serve.bases, which the rooms that compile may not import.
    root = Path(os.path.expanduser(os.environ.get("SECURA_CACHE") or "~/.cache/secura-serve"))
    file = root / "native" / f"{key}.so"
    if not file.is_file() or file.stat().st_uid not in (0, os.getuid()):
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".", dir=file.parent) as work:
            new = Path(work) / file.name
            _run(*command, *flags, *includes, "-o", str(new), str(source), *links)
            # Several processes may get here at once: each puts the same thing in place.
            new.replace(file)
    return file


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


def _processor() -> str:
    """Return what ``-march=native`` depends on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    features = (line for line in lines if line.startswith(("flags", "Features")))
    return f"{platform.machine()} {next(features, platform.processor())}"
