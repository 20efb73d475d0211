"""From the command's flags to a checked plan: every problem is reported before the first byte."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from secura_serve.errors import MergeError
from secura_serve.merge.io.layout import Shard, with_dtype
from secura_serve.merge.methods import LINEAR, MergeMethod
from secura_serve.merge.source import NOTHING_DONE, Source, open_source, plan_fold
from secura_serve.merge.stream import FoldPlan
from secura_serve.merge.verify import base_mismatches, quantised_targets, shards_of
from secura_serve.system.atomic import place_problem

__all__ = [
    "DTYPES",
    "INDEX",
    "MergePlan",
    "extra_files",
    "out_problems",
    "plan_merge",
    "space_problems",
]

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# Weights in other formats, training state, and what describes the base only.
_WEIGHTS = "safetensors bin pt pth ckpt h5 msgpack gguf onnx ot tflite npz pkl"
_NOT_COPIED = {"README.md", "secura_manifest.json", "adapter_config.json"}
_SPARE = 2**20
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class MergePlan:
    """Everything that the writer needs to know; made by :func:`plan_merge`."""

    source: Source
    fold: FoldPlan
    shards: tuple[tuple[Shard, Shard], ...]
    """(as it lies in the base, as it will lie in the output), in order of name."""
    extras: tuple[str, ...]
    out: Path

    @property
    def nbytes(self) -> int:
        """Bytes of the output's safetensors files."""
        return sum(new.nbytes for _, new in self.shards)

    def summary(self) -> str:
        """Return what ``--dry-run`` prints."""
        names = ", ".join(f"{a.name}*{w:g}" for a, w in self.source.adapters)
        dtypes = sorted({t.code for _, new in self.shards for t in new.tensors})
        lines = [
            f"base      {self.source.model_id} ({self.source.checkpoint.path})",
            f"adapters  {names}; S-MagNorm {self.source.norm.to_json() or 'none'}; method "
            f"{self.source.method.to_json() or 'linear'}",
            f"output    {self.out} ({', '.join(dtypes)}; {self.nbytes / 2**20:,.1f} MiB)",
            f"copied    {', '.join(self.extras)}",
        ]
        for old, new in self.shards:
            touched = [t for t in old.tensors if t.name in self.fold.targets]
            size = sum(t.nbytes for t in touched) / 2**20
            lines.append(
                f"  {new.name}: {len(touched)} of {len(old.tensors)} tensors folded, "
                f"{size:,.1f} of {old.nbytes / 2**20:,.1f} MiB"
            )
        return "\n".join(lines)


def extra_files(folder: Path) -> list[str]:
    """Return the files to copy: configuration, tokenizer, template, licence, code; no weights."""
    return sorted(
        file.name
        for file in folder.iterdir()
        if file.is_file()
        and not file.name.startswith(".")
        and file.suffix.lstrip(".") not in _WEIGHTS.split()
        and not file.name.endswith(".index.json")
        and file.name not in _NOT_COPIED
    )


def out_problems(out: Path) -> list[str]:
    """Return every reason why ``out`` cannot be made, whatever its size."""
    problems = []
    if os.path.lexists(out):
        problems.append(f"{out} exists: choose another folder, or remove it first")
    if problem := place_problem(out):
        problems.append(f"{problem}: choose another folder")
    return problems


def space_problems(out: Path, nbytes: int) -> list[str]:
    """Return every reason why ``nbytes`` cannot be written to a new folder ``out``."""
    problems = out_problems(out)
    above = next(p for p in out.parents if os.path.exists(p))
    if (free := shutil.disk_usage(above).free) < (needed := nbytes + _SPARE):
        problems.append(
            f"{above} has {free / 2**20:,.0f} MiB free, the output needs {needed / 2**20:,.0f}: "
            "make room or choose another disk"
        )
    return problems


def plan_merge(
    base: str,
    specs: Sequence[str],
    out: str | Path,
    dtype: str = "auto",
    *,
    exists: bool = False,
    method: MergeMethod = LINEAR,
) -> MergePlan:
    """Plan a merge and check everything that can be known before the first byte is written.

    That includes the fingerprint of every module: the targets are read twice, for about a tenth
    of a merge's time where the base fits into the page cache.

    Args:
        base: alias, hub id or folder.
        specs: adapter folders, ``folder`` or ``folder*weight``.
        dtype: of the output's floats; ``auto`` keeps each tensor's own.
        exists: the output is there and will only be compared; the stream checks fingerprints.
        method: how several adapters become one update.

    Raises:
        MergeError: with every problem found.
    """
    target = Path(os.path.abspath(out))
    known = [] if exists else out_problems(target)
    source = open_source(base, specs, known, wrong_use=bool(known), method=method)
    output_dtype = DTYPES.get(dtype)
    folder, old = source.checkpoint.path, shards_of(source)
    plan = MergePlan(
        source,
        plan_fold(source, output_dtype),
        tuple((shard, with_dtype(shard, output_dtype)) for shard in old),
        tuple(extra_files(folder)),
        target,
    )
    if exists:
        problems = quantised_targets(old, plan.fold)
        problems += [] if target.is_dir() else [f"{target} is not there to be checked"]
    else:
        copied = sum((folder / name).stat().st_size for name in plan.extras)
        problems = space_problems(target, plan.nbytes + copied) + base_mismatches(source, plan.fold)
    if problems:
        raise MergeError(NOTHING_DONE, problems, wrong_use=exists and not target.is_dir())
    return plan if exists else replace(plan, fold=replace(plan.fold, checked=True))
