"""What every benchmark says of itself: when, which commit, on what, with which versions."""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import signal
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def out_file(text: str) -> Path:
    """Return the path of a file that can be written; an argparse type, so refused at the start."""
    file = Path(text)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text} cannot be written: {error.strerror}") from error
    if file.is_dir() or not os.access(file.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text} cannot be written")
    return file


def end_on_terminate() -> None:
    """Have SIGTERM unwind like Ctrl-C, so that servers that were started are stopped."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


def report_head(module: str, packages: tuple[str, ...]) -> dict[str, Any]:
    """The head of a report on one of our modules: its command, then :func:`header`."""
    return {"command": " ".join(["python", "-m", module, *sys.argv[1:]]), **header(packages)}


def header(packages: tuple[str, ...]) -> dict[str, Any]:
    """The head of a report; call it before the work, since it notes the load."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine(),
        "versions": versions(sys.executable, packages),
    }


def machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    models = [line.split(":")[1].strip() for line in info.splitlines() if "model name" in line]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(memory, 1),
        "load_before": [round(x, 2) for x in os.getloadavg()],
    }


def commit() -> str:
    if shutil.which("git") is None:
        return ""
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
    dirty = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True)
    return head.stdout.strip() + ("+changes" if dirty.stdout.strip() else "")


def versions(python: str, names: tuple[str, ...]) -> dict[str, str]:
    """Of the packages that ``python`` sees."""
    code = "import sys; from importlib.metadata import version; print(*map(version, sys.argv[1:]))"
    said = subprocess.check_output([python, "-c", code, *names], text=True)
    return dict(zip(names, said.split(), strict=True))
