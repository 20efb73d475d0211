"""Delta images of adapters, made in the background and kept for the next start."""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from secura_serve.atomic import only_writer
from secura_serve.checkpoint import Checkpoint
from secura_serve.errors import StorageError
from secura_serve.merge import open_source, plan_fold, update_stream
from secura_serve.serve.app.adapters.content.fine_tune import FineTune, updates_of
from secura_serve.serve.delta_image import DeltaImage, image_nbytes, write_image

__all__ = ["KEPT_DAYS", "DeltaImages", "step_back"]

KEPT_DAYS = 30
_FORMAT = 1
_OWN = "process"


class DeltaImages:
    """The images of one base's adapters.

    Args:
        root: the folder that holds them.
        base: the base's folder.
        dtype: ``int8`` or ``float32``.
    """

    def __init__(self, root: Path, base: Path, dtype: str) -> None:
        self.root, self.dtype = root, dtype
        self._base = base
        # One at a time, at the lowest priority: who is being answered comes first.
        self._thread = ThreadPoolExecutor(1, "delta-image", step_back)
        self._checked: dict[Path, tuple[int, int, int] | None] = {}

    def folder(self, name: str, digest: str) -> Path:
        """Return where the image of an adapter's content is, or will be.

        Workers know an adapter by this folder, so that two of one content have one each.
        """
        facts = [
            (f.name, (s := f.stat()).st_size, s.st_mtime_ns)
            for f in sorted(self._base.glob("*.safetensors"))
        ]
        what = f"{_FORMAT}|{self._base.resolve()}|{facts}|{self.dtype}|{name}|{digest}"
        return self.root / hashlib.sha256(what.encode()).hexdigest()[:32]

    def own_folder(self, number: int) -> Path:
        """Return where the image of something is that only this process has, by its number."""
        return self.root / f"{_OWN}-{os.getpid()}-{number}"

    async def make(self, folder: Path, specs: Sequence[str]) -> DeltaImage:
        """Return the image in ``folder``, made now in the background if it is not there.

        Args:
            specs: what is folded, ``folder`` or ``folder*weight``; that of a fine-tune, which was
                made when it was verified, names the image itself.

        Raises:
            MergeError: see :func:`~secura_serve.merge.update_stream`.
            StorageError: it cannot be written.
        """
        with suppress(StorageError):
            # Not behind those that are being made.
            return await asyncio.to_thread(self.found, folder)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self._make, folder, specs)

    def of_fine_tune(self, folder: Path, tuned: FineTune, path: Path) -> bool:
        """Make the image of a checkpoint in ``path``; return False if it is there already.

        Raises:
            StorageError: it cannot be written.
        """
        with suppress(StorageError):
            self.found(folder)
            return False
        base = Checkpoint(self._base)
        self._write(folder, tuned.modules, updates_of(path, base, tuned.modules))
        return True

    def found(self, folder: Path) -> DeltaImage:
        """Return the image in ``folder``, whose bytes are compared with what was written unless
        that was done since they changed. Raises StorageError if there is none."""
        image, stamp = DeltaImage.open(folder), None
        with suppress(OSError):
            stamp = image.stamp()
            os.utime(folder)
        if stamp is None or self._checked.get(folder) != stamp:
            image.check()
            self._checked[folder] = stamp
        return image

    def _make(self, folder: Path, specs: Sequence[str]) -> DeltaImage:
        if [str(folder)] == [*specs]:
            return self.found(folder)
        torch.set_num_threads(1)
        source = open_source(str(self._base), specs)
        plan = plan_fold(source)
        # As the stream yields them: in the order of the files.
        stored = [n for n, _ in source.checkpoint.tensors(t.module for t in plan.targets.values())]
        modules = [plan.targets[name].module for name in stored if name in plan.targets]
        shapes = {module: source.checkpoint.shape(module) for module in modules}
        return self._write(folder, shapes, update_stream(source, plan))

    def _write(
        self,
        folder: Path,
        shapes: Mapping[str, tuple[int, int]],
        updates: Iterable[tuple[str, Tensor]],
    ) -> DeltaImage:
        self._refuse_without_space(image_nbytes(shapes.values(), self.dtype))
        with only_writer(folder, wait=True):
            with suppress(StorageError):
                return self.found(folder)
            return write_image(folder, shapes, updates, self.dtype)

    def _refuse_without_space(self, nbytes: int) -> None:
        try:
            self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
            free = shutil.disk_usage(self.root).free
        except OSError as error:
            raise StorageError(f"{self.root} cannot be used: {error}") from error
        if free < nbytes:
            raise StorageError(
                f"{self.root} has {free / 2**20:,.0f} MiB free, the changes of the adapter's "
                f"weights need {nbytes / 2**20:,.0f}: free some space there, or point SECURA_CACHE "
                "at another folder"
            )

    def remove(self, folder: Path) -> None:
        """Remove an image that nothing needs any more."""
        shutil.rmtree(folder, ignore_errors=True)
        self._checked.pop(folder, None)
        with suppress(OSError):
            (folder.parent / f".{folder.name}.lock").unlink()

    def remove_unused(self, days: float = KEPT_DAYS) -> None:
        """Remove images that no server has used for ``days``, and what killed processes left."""
        oldest = time.time() - days * 86400
        for entry in self.root.glob("*"):
            with suppress(OSError):
                if entry.stat().st_mtime < oldest or _left_behind(entry.name):
                    self.remove(entry)


def _left_behind(name: str) -> bool:
    """Return whether a folder is that of a process that is no more."""
    prefix, _, rest = name.partition("-")
    number = rest.partition("-")[0]
    if prefix != _OWN or not number.isdecimal():
        return False
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        return False
    return False


def step_back() -> None:
    """Give the calling thread the lowest priority, where the system has one for threads."""
    with suppress(OSError, AttributeError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
