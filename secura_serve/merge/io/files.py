"""The output folder of a merge, and the base's other files in it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import Timeout
from tqdm import tqdm

from secura_serve.errors import MergeError
from secura_serve.system.atomic import atomic_folder, only_writer
from secura_serve.system.os_errors import described

__all__ = ["copy_extra_files", "new_folder", "progress"]


@contextmanager
def new_folder(out: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a hidden work folder beside ``out`` that takes its name when the block ends well.

    What a killed run left behind is removed by the next one for the same name. With ``replace``
    the folder takes the place of an existing ``out``, which is whole until then.

    Raises:
        MergeError: another process is writing to ``out``, or the disk is full or fails.
    """
    try:
        with only_writer(out, wait=False), atomic_folder(out, replace=replace) as work:
            yield work
    except Timeout as error:
        raise MergeError(f"another merge is writing to {out}: wait for it") from error
    except OSError as error:
        raise MergeError(
            f"{out} was not written ({described(error)}); nothing was left behind. Check the free "
            "space and the health of the disks, then run it again"
        ) from error


def progress(total: int, what: str) -> Any:
    """Return a progress bar in bytes: shown on a terminal, silent elsewhere."""
    return tqdm(total=total, desc=what, unit="B", unit_scale=True, unit_divisor=1024, disable=None)


def copy_extra_files(
    source: Path, names: tuple[str, ...], work: Path, dtype: torch.dtype | None
) -> None:
    """Copy the base's other files; config.json last, since it makes a folder a checkpoint.

    Args:
        dtype: for config.json, under the key that it has already; None keeps it.
    """
    for name in names:
        if name != "config.json":
            shutil.copyfile(source / name, work / name)
    config = (source / "config.json").read_text(encoding="utf-8")
    if dtype is not None:
        values = json.loads(config)
        key = "torch_dtype" if "torch_dtype" in values else "dtype"
        values[key] = str(dtype).removeprefix("torch.")
        config = json.dumps(values, indent=2) + "\n"
    (work / "config.json").write_text(config, encoding="utf-8")
