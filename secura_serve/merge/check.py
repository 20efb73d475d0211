"""Comparing a merge with what the same command would write, without writing it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from secura_serve.adapter.format import WEIGHTS_NAME
from secura_serve.errors import MergeError
from secura_serve.merge.io.buffers import as_bytes, opened
from secura_serve.merge.io.files import progress
from secura_serve.merge.io.layout import Stored, read_shard
from secura_serve.merge.manifest import describe, read_manifest
from secura_serve.merge.plan import MergePlan
from secura_serve.merge.transfer import is_decoded, output_tensors
from secura_serve.system.os_errors import reason

__all__ = ["check_merge"]


def check_merge(plan: MergePlan) -> int:
    """Compare ``plan.out`` with what :func:`write_merge` would write; returns how many tensors were
    compared.

    Raises:
        MergeError: with every tensor and file that differs; at once where the manifest names other
            adapters.
    """
    problems = _manifest_problems(plan)
    if problems:
        raise MergeError(f"{plan.out} is not what this merge would write:", problems)
    tensors = output_tensors(plan, {}, None)
    base, decoded = plan.source.checkpoint.path, is_decoded(plan)
    with progress(plan.nbytes, f"checking {plan.out.name}") as bar:
        for old, new in plan.shards:
            try:
                written = read_shard(plan.out / new.name).tensors
            except (OSError, ValueError) as error:
                raise MergeError(
                    f"{plan.out / new.name} cannot be read: {reason(error)}"
                ) from error
            if written != new.tensors:
                problems.append(f"{new.name}: other tensors, shapes or dtypes")
                for _ in filter(decoded, old.tensors):
                    next(tensors)
                continue
            with opened(base / old.name) as left, opened(plan.out / new.name) as right:
                for stored, placed in zip(old.tensors, new.tensors, strict=True):
                    if decoded(stored):
                        same = _equal(as_bytes(next(tensors)), right, placed)
                    else:
                        same = all(
                            _equal(
                                memoryview(os.pread(left, size, stored.begin + at)),
                                right,
                                placed,
                                at,
                            )
                            for at, size in _chunks(stored.nbytes)
                        )
                    if not same:
                        problems.append(f"{stored.name}: other values")
                    bar.update(placed.nbytes)
    for name in plan.extras:
        if name != "config.json" and not _same_file(base / name, plan.out / name):
            problems.append(f"{name}: differs from the base's")
    if problems:
        raise MergeError(f"{plan.out} is not what this merge would write:", problems)
    return sum(len(new.tensors) for _, new in plan.shards)


def _manifest_problems(plan: MergePlan) -> list[str]:
    """Return what the manifest says was folded, where that is something else."""

    def folded(facts: dict[str, Any]) -> list[tuple[float, str]]:
        return [(a["weight"], a["sha256"][WEIGHTS_NAME]) for a in facts["adapters"]]

    try:
        there, now = read_manifest(plan.out), describe(plan.source)
        if there.get("method") != now.get("method"):
            methods = (f.get("method") or "linear" for f in (there, now))
            return ["its manifest says that its method was {}, not {}".format(*methods)]
        # Not by name: a folder may have been renamed.
        if folded(there) == folded(now):
            return []
        was, wanted = (
            " + ".join(f"{a['name']}*{a['weight']:g}" for a in f["adapters"]) for f in (there, now)
        )
    except (MergeError, KeyError, TypeError):
        return []  # without a manifest the tensors are compared
    same = "; the names are the same, the weights are not" if was == wanted else ""
    return [f"its manifest says that it was made with {was}, not with {wanted}{same}"]


def _chunks(nbytes: int, size: int = 8 * 2**20) -> Iterator[tuple[int, int]]:
    return ((at, min(size, nbytes - at)) for at in range(0, nbytes, size))


def _equal(data: memoryview, fd: int, placed: Stored, at: int = 0) -> bool:
    """Tell whether the file holds ``data`` at offset ``at`` of a tensor."""
    return all(
        data[start : start + size] == os.pread(fd, size, placed.begin + at + start)
        for start, size in _chunks(len(data))
    )


def _same_file(left: Path, right: Path) -> bool:
    return right.is_file() and left.read_bytes() == right.read_bytes()
