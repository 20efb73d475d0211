"""The worker's half of a fold in the running engine: weights change in place.

Mixed into vLLM's worker (``--worker-extension-cls``) and called on every rank while the engine is
paused. Folded weights always come from the pristine base on disk, through the stream that merging
uses, and reach the model through vLLM's own reload: it slices for the rank, repacks for the kernel,
and copies into the tensors that compiled code and CUDA graphs hold. On a GPU plain linears are
folded where they lie, each rank its own part, and what the others need of the base is kept in
memory (:mod:`secura_serve.serve.engine.fold`).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from secura_serve.checkpoint import Checkpoint
from secura_serve.errors import MergeError
from secura_serve.merge import FoldPlan, base_stamp, fold_stream, open_source, plan_fold
from secura_serve.method import MagNorm
from secura_serve.serve import compat
from secura_serve.serve.engine.adapter_calls import AdapterCalls
from secura_serve.serve.engine.fold.pristine import PristineCopies
from secura_serve.serve.engine.fold.shards import Shards
from secura_serve.serve.engine.ranks import on_every_rank

__all__ = ["WorkerExtension", "with_siblings"]

# Each holds a tensor or two; more would wait for memory.
_THREADS = 4


def with_siblings(
    modules: Iterable[str], packed: dict[str, list[str]], held: Iterable[str]
) -> list[str]:
    """Return ``modules`` and all that the engine packs into one linear with any of them.

    vLLM takes a reloaded linear as complete once it has seen as many numbers as it holds, so q
    and v without k would leave the memory of k as it happens to be.

    Args:
        packed: vLLM's ``packed_modules_mapping``, for instance ``{"qkv_proj": ["q_proj", …]}``.
        held: the linears of the base, which give the order of the result.
    """
    wanted = set(modules)
    for module in tuple(wanted):
        parent, _, leaf = module.rpartition(".")
        for parts in packed.values():
            if leaf in parts:
                wanted |= {f"{parent}.{part}" for part in parts}
    return [module for module in held if module in wanted]


class WorkerExtension(AdapterCalls):
    """Methods that vLLM adds to each worker; ``model_runner`` and ``reload_weights`` are its."""

    model_runner: Any
    reload_weights: Any

    @on_every_rank
    def secura_fold(
        self, spec: str | None, cores: Sequence[int] = (), proof: str | None = None
    ) -> dict[str, Any]:
        """Put the weights of ``spec`` (an adapter's folder) or of the base (None) in place.

        Only linears that change are touched, with their packed siblings: those of ``spec`` and
        those of what was folded before.

        Args:
            cores: CPUs to fold on, where the weights are in CPU memory. vLLM binds a worker to
                some; while the engine is paused the others have nothing to do.
            proof: what :func:`~secura_serve.merge.verify_base` returned for the same base and
                ``spec``. If it still holds, the fingerprints are not compared again.

        Returns:
            ``{"modules": changed, "in_place": how many of them were folded where they lie, "bytes":
            of those and of what was read for the others, "seconds": taken}``.

        Raises:
            MergeError, AdapterError: some rank failed. The weights are then those of neither, and
                the caller must put the base back (``spec=None``) or stop the engine.
        """
        compat.check_worker(self)
        start = time.perf_counter()
        config = self.model_runner.model_config
        if spec is None:
            base, plan = Checkpoint(config.model), FoldPlan({}, MagNorm())
        else:
            source = open_source(config.model, [spec])
            base, plan = source.checkpoint, plan_fold(source, config.dtype)
            plan = replace(plan, checked=base_stamp(source, plan) == proof)
        now = {target.module for target in plan.targets.values()}
        model = self.model_runner.get_model()
        # Kept on the worker, not by name: what lies in the adapter's folder may have changed.
        dirty: set[str] = getattr(self, "_secura_dirty", set())
        self._secura_dirty = now | dirty
        packed, device = compat.packed_modules(model), self.model_runner.device

        def siblings(modules: Iterable[str]) -> list[str]:
            return with_siblings(modules, packed, base.linears())

        shards, copies = self._keepers(model, base, siblings)
        in_place = shards.take(base, plan, self._secura_dirty) if shards else []
        modules = siblings(self._secura_dirty - set(in_place))
        nbytes = 0
        if shards:
            nbytes = shards.put(base, plan, in_place)
            # Before it happens: where a reload fails, nobody knows what lies there.
            shards.reloaded(modules, moved=modules)
        tensors = copies.stream(base, modules, device) if copies else base.tensors(modules)
        left = {n: t for n, t in plan.targets.items() if t.module not in in_place}
        with _pool(cores if device.type == "cpu" else ()) as pool, compat.quiet_reload():
            stream = _Stream(fold_stream(tensors, replace(plan, targets=left), pool=pool))
            if modules:
                self.reload_weights(weights_iterator=stream, is_checkpoint_format=True)
        if stream.error is not None:
            raise stream.error
        if shards:
            shards.reloaded(modules, moved=now)
        if plan.checked and base_stamp(source, plan) != proof:
            raise MergeError("the base's files changed while they were read: fold again")
        self._secura_dirty = now
        taken = time.perf_counter() - start
        changed = {"modules": len(modules) + len(in_place), "in_place": len(in_place)}
        return changed | {"bytes": nbytes + stream.nbytes, "seconds": taken}

    def _keepers(
        self, model: Any, base: Checkpoint, siblings: Callable[[Iterable[str]], list[str]]
    ) -> tuple[Shards, PristineCopies] | tuple[None, None]:
        """Return what this worker keeps of the base between folds: nothing on a CPU."""
        if not keeps_base(self.model_runner.device):
            return None, None
        kept: tuple[Shards, PristineCopies] | None = getattr(self, "_secura_kept", None)
        if kept is None:
            copies = PristineCopies(self._ranks_here())
            kept = self._secura_kept = Shards(model, base, siblings, copies), copies
        return kept

    def _ranks_here(self) -> int:
        """Return how many workers may keep copies of the base on this machine."""
        return max(torch.accelerator.device_count(), 1)


def keeps_base(device: torch.device) -> bool:
    """Return whether copies and places of the base are kept for a device's next fold: on a CPU
    the weights are packed for the processor, and the base's files lie in the same memory."""
    return device.type != "cpu"


@contextmanager
def _pool(cores: Sequence[int]) -> Iterator[tuple[ThreadPoolExecutor, int] | None]:
    """Yield threads to fold in, free to run on any of ``cores``."""
    count = min(len(cores), _THREADS)
    if count < 2:
        yield None
        return

    def start() -> None:
        # A core may have been taken away from us since; then the thread stays where it is.
        with suppress(OSError):
            os.sched_setaffinity(0, cores)

    with ThreadPoolExecutor(count, "fold", start) as executor:
        yield executor, count


class _Stream:
    """The tensors of a fold, up to its first error.

    An exception inside vLLM's reload would leave linears without memory. Ending early instead
    lets it put every linear back together; the values are made good afterwards.
    """

    def __init__(self, tensors: Iterator[tuple[str, Tensor]]) -> None:
        self._tensors = tensors
        self.error: Exception | None = None
        self.nbytes = 0

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        try:
            for name, tensor in self._tensors:
                self.nbytes += tensor.nbytes
                yield name, tensor
        except Exception as error:
            self.error = error
