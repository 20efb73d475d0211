"""Writing a planned merge as a checkpoint folder, whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from secura_serve.merge.fold import Change
from secura_serve.merge.io.files import copy_extra_files, new_folder, progress
from secura_serve.merge.manifest import MANIFEST, card, manifest
from secura_serve.merge.plan import INDEX, MergePlan
from secura_serve.merge.transfer import write_shards

__all__ = ["write_merge"]


def write_merge(plan: MergePlan) -> dict[str, Any]:
    """Write the checkpoint that ``plan`` describes; returns its manifest.

    The folder appears whole or not at all; config.json, which makes it a checkpoint, is written
    last.

    Raises:
        MergeError: another base, NaN or Inf on the way, or a disk that fails.

    Peak memory: see :func:`~secura_serve.merge.transfer.write_shards`.
    """
    changes: dict[str, Change] = {}
    with new_folder(plan.out) as work:
        with progress(plan.nbytes, plan.out.name) as bar:
            digests = write_shards(plan, work, changes.__setitem__, bar.update)
        facts = manifest(plan, digests, changes)
        _write_index(plan, work)
        (work / MANIFEST).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        (work / "README.md").write_text(card(plan.out.name, facts), encoding="utf-8")
        copy_extra_files(plan.source.checkpoint.path, plan.extras, work, plan.fold.dtype)
    return facts


def _write_index(plan: MergePlan, work: Path) -> None:
    """Write the index of a sharded base with the new total size."""
    file = plan.source.checkpoint.path / INDEX
    if not file.is_file() or len(plan.shards) < 2:
        return
    index = json.loads(file.read_text(encoding="utf-8"))
    size = sum(t.nbytes for _, new in plan.shards for t in new.tensors)
    index["metadata"] = index.get("metadata", {}) | {"total_size": size}
    (work / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
