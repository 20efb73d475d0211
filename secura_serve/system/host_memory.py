"""Main memory that a process may still take, also in a container."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import psutil

__all__ = ["available_memory"]


class _Files(NamedTuple):
    """Where one version of Linux control groups says what a group may take and has taken."""

    mount: str
    limit: str
    used: str
    reclaimable: str
    """Entry of ``memory.stat``: what the page cache gives up first."""


_V1 = _Files(
    "sys/fs/cgroup/memory",
    "memory.limit_in_bytes",
    "memory.usage_in_bytes",
    "total_inactive_file",
)
_V2 = _Files("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file")


def available_memory(root: Path = Path("/")) -> int:
    """Return the bytes of main memory that this process may still take.

    That is what the machine has free, or less where a control group limits it, as containers,
    Kubernetes and systemd do: limit − (used − page cache that was not touched lately), the least
    over the process's group and those above it. ``psutil`` knows only of the machine.

    Args:
        root: where ``/proc`` and ``/sys`` are.
    """
    free = int(psutil.virtual_memory().available)
    return max(0, min([free, *_left_in_groups(root)]))


def _left_in_groups(root: Path) -> Iterator[int]:
    groups = ""
    with suppress(OSError):
        # A group may have any name.
        groups = os.fsdecode((root / "proc/self/cgroup").read_bytes())
    for line in groups.split("\n"):
        if line.count(":") < 2:
            continue
        _, controllers, path = line.split(":", 2)
        if not controllers or "memory" in controllers.split(","):
            files = _V1 if controllers else _V2
            mount = root / files.mount
            group = mount / path.strip("/")
            # In a container the path may be the host's; then the mount itself is the group.
            for folder in (group, *group.parents):
                if folder.is_relative_to(mount):
                    # Groups without a limit say "max", and the topmost one has no such files.
                    with suppress(OSError, ValueError):
                        yield _left(folder, files)


def _left(group: Path, files: _Files) -> int:
    limit = int((group / files.limit).read_text())
    used = int((group / files.used).read_text())
    entries = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    return limit - used + int(entries.get(files.reclaimable, 0))
