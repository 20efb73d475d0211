"""Delta images of adapters, made in the background and kept for the next start."""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import torch
from filelock import FileLock
from torch import Tensor

from secura_serve.checkpoint import Checkpoint
from secura_serve.errors import StorageError
from secura_serve.merge import open_source, plan_fold, update_stream
from secura_serve.serve.app.adapters.content.fine_tune import FineTune, updates_of
from secura_serve.serve.delta_image import DeltaImage, image_nbytes, write_image
from secura_serve.system.atomic import only_writer

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
        self._stopped = threading.Event()
        # Not the process's number: in another container, or after a restart, another has the same.
        self._own = f"{_OWN}-{uuid.uuid4().hex}"
        # Held from the first such image on; the kernel drops it with the process.
        self._alive = FileLock(root / f".{self._own}.lock", thread_local=False)

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
        return self.root / f"{self._own}-{number}"

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
            try:
                return self.found(folder)
            except StorageError as error:
                raise StorageError(
                    f"{error}; POST to /v1/adapters/reload makes it again from the checkpoint"
                ) from error
        torch.set_num_threads(1)
        self._refuse_if_stopped()
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
        try:
            if folder.name.startswith(self._own) and not self._alive.is_locked:
                self._alive.acquire()
            with only_writer(folder, wait=True):
                with suppress(StorageError):
                    return self.found(folder)
                return write_image(folder, shapes, self._until_stopped(updates), self.dtype)
        except OSError as error:
            raise StorageError(
                f"{self.root} cannot be written ({error}): point SECURA_CACHE at another folder"
            ) from error

    def stop(self) -> None:
        """Make no images any more, and give up the one that is being made: Python waits for its
        threads before it ends."""
        self._stopped.set()

    def _refuse_if_stopped(self) -> None:
        if self._stopped.is_set():
            raise StorageError("the server is stopping, and makes no changes of weights any more")

    def _until_stopped(self, updates: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for update in updates:
            self._refuse_if_stopped()
            yield update

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
        if folder.is_symlink():
            folder.unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        self._checked.pop(folder, None)
        self._clear(folder)

    @staticmethod
    def _clear(folder: Path) -> bool:
        """Remove the lock of an image and its unfinished drafts; return False, and remove nothing,
        while somebody holds the lock."""
        try:
            with only_writer(folder, wait=False):
                return True
        except OSError:
            return False

    def remove_unused(self, days: float = KEPT_DAYS) -> None:
        """Remove images that no server has used for ``days``, and what killed processes left."""
        oldest, running = time.time() - days * 86400, dict[str, bool]()
        for entry in self.root.glob("*"):
            # Hidden are an image's lock and drafts: .NAME.lock, .NAME.RANDOM.partial.
            name = entry.name.removeprefix(".").partition(".")[0]
            process = _process_of(name)
            if process is not None and process not in running:
                running[process] = not self._clear(self.root / process)
            with suppress(OSError):
                if running[process] if process else entry.stat().st_mtime >= oldest:
                    continue
                if entry.name == name:
                    self.remove(entry)
                else:
                    self._clear(self.root / name)


def _process_of(name: str) -> str | None:
    """Return the process that alone has an image, or None: ``process-ID`` of ``process-ID-7``."""
    kind, _, rest = name.partition("-")
    return f"{kind}-{rest.partition('-')[0]}" if kind == _OWN and rest else None


def step_back() -> None:
    """Give the calling thread the lowest priority, where the system has one for threads."""
    with suppress(OSError, AttributeError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
