"""How far adapters move the base: ‖W'−W‖ / ‖W‖ of every linear, computed beside the requests."""

from __future__ import annotations

import asyncio
import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError

from secura_serve.adapter import load
from secura_serve.checkpoint import Checkpoint
from secura_serve.errors import BaseModelError, LifecycleError, SecuraError
from secura_serve.merge import fold_stream, open_source, plan_fold
from secura_serve.method import dequantise_rows, frobenius, gather, product_norm
from secura_serve.serve.app.adapters.content.images import step_back
from secura_serve.serve.app.adapters.content.verifier import Entry
from secura_serve.serve.app.adapters.library import Version
from secura_serve.serve.delta_image import DeltaImage

__all__ = ["WeightChanges", "relative_changes"]

KEPT = 256


class WeightChanges:
    """The changes of the contents that were asked for; each is computed once.

    Args:
        base: opens the base's checkpoint. Called when it must be read: what was read stays mapped
            as long as a checkpoint is open.
    """

    def __init__(self, base: Callable[[], Checkpoint]) -> None:
        self._base = base
        # One at a time, at the lowest priority: who is being answered comes first.
        self._thread = ThreadPoolExecutor(1, "weight-changes", _prepare_thread)
        self._known: OrderedDict[str, asyncio.Task[dict[str, float]]] = OrderedDict()
        """Digest -> what is being computed, or was."""

    async def of(self, version: Version) -> Mapping[str, float]:
        """Return module -> ‖W'−W‖ / ‖W‖ of one version; all who ask share one computation.

        Raises:
            LifecycleError: (503) its files or the base's cannot be read.
        """
        task = self._known.get(version.digest)
        if task is None:
            task = asyncio.ensure_future(self._compute(version.entry))
            self._known[version.digest] = task
            task.add_done_callback(lambda done: self._forget_failed(version.digest, done))
            while len(self._known) > KEPT and next(iter(self._known.values())).done():
                self._known.popitem(last=False)
        self._known.move_to_end(version.digest)
        # Whoever goes away leaves the others waiting.
        return await asyncio.shield(task)

    async def _compute(self, entry: Entry) -> dict[str, float]:
        ended = threading.Event()
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._thread, self._ratios, entry, ended)
        except (SecuraError, SafetensorError, OSError) as error:
            raise LifecycleError(
                503, f"the changes of {entry.shown} cannot be computed: {error}"
            ) from error
        finally:
            # The process would wait for the thread when it ends.
            ended.set()

    def _ratios(self, entry: Entry, ended: threading.Event) -> dict[str, float]:
        base, ratios = self._base(), dict[str, float]()
        for module, ratio in relative_changes(entry, base):
            if not math.isfinite(ratio):
                raise BaseModelError(f"{module}: NaN or Inf in the base: fetch it again")
            ratios[module] = ratio
            if ended.is_set():
                break
        return {module: ratios[module] for module in base.linears() if module in ratios}

    def _forget_failed(self, digest: str, task: asyncio.Task[dict[str, float]]) -> None:
        if (task.cancelled() or task.exception() is not None) and self._known.get(digest) is task:
            del self._known[digest]


def _prepare_thread() -> None:
    step_back()
    torch.set_num_threads(1)


def relative_changes(entry: Entry, base: Checkpoint) -> Iterator[tuple[str, float]]:
    """Yield module and ‖W'−W‖ / ‖W‖ (Frobenius) of every linear that an adapter changes.

    W' is what its requests are answered with, before any rounding to the engine's dtype; of a
    fine-tune it is what its delta image holds. Sums run in float64. A W of zeros gives 0.

    Raises:
        SecuraError: a file cannot be read, or belongs to another base.

    Peak memory: one weight, and in float32 its W' and change where S-MagNorm or a fine-tune has
    one; C·U·R and B·A are measured by their factors.
    """
    assert entry.snapshot is not None
    path = entry.snapshot.path
    if entry.lora is not None:
        for module, B, A in entry.lora.factors():
            yield module, _ratio(product_norm(B, A), frobenius(base.weight(module)))
    elif entry.fine_tune is not None:
        image = DeltaImage.open(path)
        for module, weight, scale in image.read(image.modules):
            moved = frobenius(dequantise_rows(weight, scale))
            yield module, _ratio(moved, frobenius(base.weight(module)))
    elif entry.per_request:
        for module, cur in load(path).modules.items():
            W = base.weight(module)
            C, R = gather(W, cur.basis)
            yield module, _ratio(product_norm(C.double() @ cur.U.double(), R), frobenius(W))
    else:
        yield from _folded(path, base)


def _folded(path: Path, base: Checkpoint) -> Iterator[tuple[str, float]]:
    source = open_source(str(base.path), [str(path)])
    plan = replace(plan_fold(source), dtype=torch.float32)
    modules = [target.module for target in plan.targets.values()]
    weights = ((n, t) for n, t in source.checkpoint.tensors(modules) if n in plan.targets)
    measured: list[tuple[str, float]] = []
    for _ in fold_stream(weights, plan, lambda module, c: measured.append((module, c.relative))):
        yield measured.pop()


def _ratio(moved: float, norm: float) -> float:
    return moved / norm if norm else 0.0
