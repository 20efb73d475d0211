"""Restoring the base from a merge, bit for bit."""

from __future__ import annotations

from pathlib import Path

from secura_serve.checkpoint import Checkpoint
from secura_serve.errors import BaseModelError, MergeError
from secura_serve.merge.io.async_io import WriteQueue
from secura_serve.merge.io.buffers import digest, opened, read_tensor
from secura_serve.merge.io.files import copy_extra_files, new_folder, progress
from secura_serve.merge.io.layout import Shard, Stored, read_shard
from secura_serve.merge.manifest import read_manifest
from secura_serve.merge.plan import INDEX, extra_files, out_problems, space_problems
from secura_serve.merge.transfer import CopyRange, steps

__all__ = ["restore_base"]


def restore_base(base: Path, out: Path) -> int:
    """Put the base's tensors back into the merge ``out``, bit for bit; returns how many.

    Full digests first show that ``base`` is the one in the manifest. The new folder is written
    beside ``out`` and takes its place at the end; card and manifest are left out.

    Raises:
        MergeError: not that base, not a merge, or tensors of another dtype, each named.

    Peak memory: one tensor.
    """
    facts = read_manifest(out)
    try:
        shards = _shards(out)
        where = {t.name: (base / s.name, t) for s in _shards(base) for t in s.tensors}
    except BaseModelError as error:
        raise MergeError("nothing was restored:", error.problems) from error
    touched: dict[str, str] = facts["touched"]
    size = sum(shard.nbytes for shard in shards)
    held = {t.name: t for shard in shards for t in shard.tensors}
    problems = [
        p for name in touched for p in _placement_problems(name, where.get(name), held.get(name))
    ]
    problems += [
        f"{name}: other values than the base had that was merged"
        for name, expected in touched.items()
        if name in where and not _has_digest(expected, *where[name])
    ]
    draft = out.parent / f".{out.name}.partial"
    problems += space_problems(draft, size)
    if problems:
        raise MergeError(
            f"{out} was not restored from {base} ({facts['base']}):",
            problems,
            wrong_use=bool(out_problems(draft)),
        )
    with new_folder(out, replace=True) as work, progress(size, f"restoring {out.name}") as bar:
        writes = WriteQueue(bar.update)
        try:
            for shard in shards:
                fd = writes.open(work / shard.name, new=True)
                kept = writes.open(out / shard.name)
                opened_here = [fd, kept]
                writes.put(fd, 0, shard.head)
                for step in steps(shard, shard, lambda stored: stored.name in touched):
                    if isinstance(step, CopyRange):
                        writes.copy(kept, step.begin, fd, step.at, step.size)
                        continue
                    file, entry = where[step.stored.name]
                    opened_here.append(source := writes.open(file))
                    writes.copy(source, entry.begin, fd, step.placed.begin, entry.nbytes)
                writes.finish(*opened_here)
            writes.close()
        finally:
            writes.stop()
        if (out / INDEX).is_file():
            (work / INDEX).write_text((out / INDEX).read_text(encoding="utf-8"), encoding="utf-8")
        copy_extra_files(out, tuple(extra_files(out)), work, None)
    return len(touched)


def _shards(folder: Path) -> list[Shard]:
    return [read_shard(folder / name) for name in sorted(Checkpoint(folder).shards())]


def _placement_problems(
    name: str, there: tuple[Path, Stored] | None, here: Stored | None
) -> list[str]:
    """Return why the base's tensor cannot take its old place in the merge."""
    if there is None or here is None:
        return [f"{name}: missing in the {'base' if there is None else 'merge'}"]
    if (there[1].code, there[1].shape) == (here.code, here.shape):
        return []
    return [
        f"{name}: {here.code} {here.shape} in the merge, {there[1].code} {there[1].shape} in the "
        "base, so its bits do not fit: copy the base itself"
    ]


def _has_digest(expected: str, file: Path, stored: Stored) -> bool:
    """Tell whether the tensor has the digest ``expected``."""
    if stored.dtype is None:
        return False
    with opened(file) as fd:
        return digest(stored, read_tensor(fd, stored)) == expected
