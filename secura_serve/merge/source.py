"""A base and its adapters, opened and checked against each other, and the plan of their fold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from secura_serve.adapter import Adapter, compare_with_base, load
from secura_serve.bases import resolve_base
from secura_serve.checkpoint import Checkpoint
from secura_serve.errors import AdapterError, BaseModelError, ConfigError, MergeError
from secura_serve.merge.fold import Part, Target
from secura_serve.merge.methods import LINEAR, MergeMethod, combined_parts
from secura_serve.merge.spec import split_weight
from secura_serve.merge.stream import FoldPlan
from secura_serve.method import MagNorm, foldable_modes

__all__ = ["NOTHING_DONE", "Source", "open_source", "plan_fold"]

NOTHING_DONE = "nothing was done:"


@dataclass(frozen=True)
class Source:
    """A base that is open, and the adapters to fold into it with their weights."""

    model_id: str
    checkpoint: Checkpoint
    adapters: tuple[tuple[Adapter, float], ...]
    norm: MagNorm
    method: MergeMethod = LINEAR


def _adapter(spec: str) -> tuple[Adapter, float]:
    """Load the adapter of ``folder`` or ``folder*weight``."""
    folder, weight = split_weight(spec)
    return load(folder), weight


def _common_norm(adapters: Sequence[tuple[Adapter, float]]) -> tuple[MagNorm, list[str]]:
    """Return the one S-MagNorm of all adapters, and every reason why there is none."""
    problems = []
    for adapter, _ in adapters:
        mode = adapter.config.magnorm.mode
        if not adapter.config.magnorm.foldable:
            problems.append(
                f"{adapter.name}: S-MagNorm {mode!r} acts on activations, so that no weight gives "
                f"the same outputs; foldable modes: {', '.join(foldable_modes())}. Train it with "
                "'bounded'"
            )
    norms = {str(a.config.magnorm.to_json()): a.config.magnorm for a, _ in adapters}
    if len(norms) > 1:
        each = "; ".join(f"{a.name}: {a.config.magnorm.to_json() or 'none'}" for a, _ in adapters)
        problems.append(
            "S-MagNorm acts on the total update, so all adapters must have the same mode and "
            f"parameters; got {each}. Merge them one at a time into checkpoints of their own"
        )
    norm = next(iter(norms.values()), MagNorm())
    if not norm.combinable and (len(adapters) > 1 or adapters[0][1] != 1):
        problems.append(
            f"S-MagNorm {norm.mode!r} is defined for one adapter as it was trained (for instance, "
            "scaled by its largest change): merge that adapter alone and with weight 1"
        )
    if len({a.path.resolve() for a, _ in adapters}) < len(adapters):
        problems.append("the same adapter is given twice; write folder*2 if that is meant")
    return norm, problems


def open_source(
    base: str,
    specs: Sequence[str],
    problems: Sequence[str] = (),
    *,
    wrong_use: bool = False,
    method: MergeMethod = LINEAR,
) -> Source:
    """Open a base and its adapters and check them against each other.

    Of the fingerprints only those of the first and the last module are checked here, which is
    enough to tell another base at once. The stream checks each one before it folds, and
    :func:`~secura_serve.merge.plan.plan_merge` before anything is written.

    Args:
        problems: known already; reported together with those found here.
        wrong_use: whether one of them is how it was asked.
        method: how several adapters become one update.

    Raises:
        MergeError: with every problem found; with ``wrong_use`` if one of them is how it was asked:
            a weight that is none, no adapter, or an adapter or base that does not exist.
    """
    problems = list(problems)
    adapters: list[tuple[Adapter, float]] = []
    for spec in specs:
        try:
            adapters.append(_adapter(spec))
        except (ConfigError, AdapterError) as error:
            wrong_use |= error.wrong_use
            problems += [str(error)]
    if not specs:
        wrong_use = True
        problems.append("no adapter is given; name at least one with --adapter")
    norm, clashes = _common_norm(adapters)
    problems += clashes
    try:
        resolved = resolve_base(base)
        checkpoint = Checkpoint(resolved.path)
    except BaseModelError as error:
        wrong_use |= error.wrong_use
        problems += [f"base {base}: {p}" for p in error.problems]
    else:
        problems += [p for adapter, _ in adapters for p in _mismatches(adapter, checkpoint)]
    if problems:
        raise MergeError(NOTHING_DONE, problems, wrong_use=wrong_use)
    # The folder names of this machine say nothing to others.
    local = Path(resolved.model_id).is_absolute()
    return Source(
        Path(resolved.model_id).name if local else resolved.model_id,
        checkpoint,
        tuple(adapters),
        norm,
        method,
    )


def _mismatches(adapter: Adapter, checkpoint: Checkpoint) -> list[str]:
    """Return the modules that the base lacks or holds differently; only two weights are read."""
    names = list(adapter.modules)
    try:
        compared = compare_with_base(adapter, checkpoint, read={names[0], names[-1]})
    except BaseModelError as error:
        return [str(error)]
    trained_on = adapter.config.base_model_name_or_path
    return [
        f"{adapter.name} was trained on another base ({trained_on}): {problem}"
        for problem in compared.mismatches
    ]


def plan_fold(source: Source, dtype: torch.dtype | None = None) -> FoldPlan:
    """Return which tensors change and how, by their names in the base's files.

    Raises:
        MergeError: the method compares entries of U, and the adapters' bases differ.
        ConfigError: the method needs PEFT, which is not installed.
    """
    parts: dict[str, list[Part]] = {}
    for adapter, weight in source.adapters:
        for module, cur in adapter.modules.items():
            fingerprint = adapter.config.base_fingerprint[module]
            parts.setdefault(module, []).append(
                Part(adapter.name, weight, cur.U, cur.basis, fingerprint, cur.rho_max)
            )
    base = source.checkpoint
    targets = {
        base.tensor_name(m): Target(m, combined_parts(source.method, m, shares), base.is_conv1d(m))
        for m, shares in parts.items()
    }
    return FoldPlan(targets, source.norm, dtype)
