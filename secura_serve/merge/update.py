"""The change of every weight as a stream: D = W' − W, before any rounding to the base's dtype."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch
from torch import Tensor

from secura_serve.merge.source import Source
from secura_serve.merge.stream import FoldPlan, fold_stream

__all__ = ["update_stream"]


def update_stream(
    source: Source, plan: FoldPlan, *, pool: tuple[ThreadPoolExecutor, int] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Yield module and D ``(out, in)`` float32 for every target, in the order of the files.

    W' is folded in float32, so that D is exact to 2⁻²⁴ of W, where a fold in bfloat16 would lose
    a tenth of a small update.

    Args:
        source: base and adapters.
        plan: as :func:`~secura_serve.merge.plan_fold` made it of ``source``; its dtype is ignored.
        pool: see :func:`~secura_serve.merge.fold_stream`.

    Raises:
        MergeError: another base, or NaN or Inf in W or W'.

    Peak memory: one weight, its fold and its D in float32, and those that are folded ahead.
    """
    modules = {name: target.module for name, target in plan.targets.items()}
    base = source.checkpoint
    weights = ((n, t) for n, t in base.tensors(modules.values()) if n in modules)
    for name, new in fold_stream(weights, replace(plan, dtype=torch.float32), pool=pool):
        W = base.weight(modules[name]).to(torch.float32)
        folded = new.T if plan.targets[name].transposed else new
        yield modules[name], folded - W
