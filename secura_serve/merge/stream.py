"""The fold as a stream: tensors of a base go in, the same tensors with adapters folded come out.

One function serves every consumer: the checkpoint writer, an engine that is loading and one that
is running.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from secura_serve.errors import MergeError
from secura_serve.merge.fold import Change, Target, fold_weight, gather_target, takes_triton
from secura_serve.merge.io.buffers import buffer
from secura_serve.method import MagNorm

__all__ = ["FoldPlan", "fold_stream"]

T = TypeVar("T")
U = TypeVar("U")


@dataclass(frozen=True)
class FoldPlan:
    """What the stream does: targets by tensor name, one norm, one dtype."""

    targets: Mapping[str, Target]
    norm: MagNorm
    dtype: torch.dtype | None = None
    """Of the folded tensors; None keeps each tensor's own."""
    checked: bool = False
    """The fingerprints of the tensors that will come were compared already."""


class _Done(NamedTuple):
    """One tensor of the stream after its turn; ``tensor`` is None where there were problems."""

    name: str
    tensor: Tensor | None
    change: Change | None
    problems: list[str]


def _map_ahead(
    pool: ThreadPoolExecutor, count: int, work: Callable[[T], U], items: Iterable[T]
) -> Iterator[U]:
    """Yield ``work`` of every item, in order, with ``count`` of them being made ahead."""
    waiting: deque[Future[U]] = deque()
    for item in items:
        waiting.append(pool.submit(work, item))
        del item
        if len(waiting) > count:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def fold_stream(
    tensors: Iterable[tuple[str, Tensor]],
    plan: FoldPlan,
    observe: Callable[[str, Change], None] | None = None,
    allocate: Callable[[int], Tensor] = buffer,
    *,
    pool: tuple[ThreadPoolExecutor, int] | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Fold ``plan`` into a stream of a base's tensors; one out for each one in, in order.

    Tensors that are not targets pass through untouched. Each target is checked against the
    adapters' fingerprints first, unless the plan says that it was. After the first problem
    nothing more is yielded, but the rest of the stream is still checked, so that one error names
    everything. On a GPU numbers that are not finite show when all has been yielded.

    Args:
        tensors: (name, pristine tensor), whole (not sliced for a rank); any device.
        observe: called with (module, :class:`Change`); without it nothing is measured.
        allocate: as for :func:`~secura_serve.merge.fold.fold_weight`; may reuse the memory of
            tensors that the consumer is done with.
        pool: threads to fold in, and how many tensors to fold ahead of the consumer.

    Raises:
        MergeError: another base, NaN or Inf in W or W', or a target that is not in the stream.

    Peak memory: one tensor, its fold and small change, and those folded ahead; nothing is kept
    between tensors.
    """
    waiting, problems = set(plan.targets), list[str]()
    flags = dict[str, Tensor]()

    def fold_one(item: tuple[str, Tensor]) -> _Done:
        name, tensor = item
        if (target := plan.targets.get(name)) is None:
            return _Done(name, tensor, None, [])
        dtype = plan.dtype or tensor.dtype
        quick = observe is None and takes_triton(tensor, target, plan.norm)
        gathered, faults = list[tuple[Tensor, Tensor]](), list[str]()
        if not (quick and plan.checked):
            gathered, faults = gather_target(tensor, target, checked=plan.checked)
        if faults or problems:
            return _Done(name, None, None, faults)
        if quick:
            from secura_serve.merge.fold.triton_fold import fold_on_gpu

            # Read when all is done: to look at each would make the device wait.
            flags[target.module] = torch.zeros(1, dtype=torch.int32, device=tensor.device)
            new = fold_on_gpu(tensor, target, plan.norm, dtype, flags[target.module])
            return _Done(name, new, None, [])
        new, change = fold_weight(
            tensor,
            target,
            plan.norm,
            dtype,
            measure=observe is not None,
            allocate=allocate,
            gathered=gathered,
        )
        if not (math.isfinite(change.relative) if change else bool(torch.isfinite(new).all())):
            faults = [f"{target.module}: NaN or Inf in the base, or beyond {dtype}"]
        return _Done(name, new, change, faults)

    for done in map(fold_one, tensors) if pool is None else _map_ahead(*pool, fold_one, tensors):
        name, new, change, faults = done
        # The consumer owns it from here: holding on would keep two tensors alive.
        del done
        waiting.discard(name)
        problems += faults
        if problems or new is None:
            continue
        if observe is not None and change is not None:
            observe(plan.targets[name].module, change)
        yield name, new
        del new
    problems += [
        f"{module}: NaN or Inf in the base, or beyond its dtype"
        for module, flag in flags.items()
        if flag.item()
    ]
    problems += [f"{name}: is to be folded, but was not in the stream" for name in sorted(waiting)]
    if problems:
        raise MergeError(
            "the fold was abandoned; use the base that the adapter was trained on, undamaged, "
            "and a weight and a dtype that can hold the result:",
            problems,
        )
