"""Whether an adapter belongs to a base: the one check that loading, training, merging and serving
share."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from secura_serve.adapter.fingerprint import fingerprint_of
from secura_serve.adapter.limits import update_norm_bound
from secura_serve.adapter.store import Adapter
from secura_serve.adapter.tensors import CURModule
from secura_serve.errors import BaseMismatchError, BaseModelError
from secura_serve.method import Basis, gather

__all__ = [
    "BaseComparison",
    "WeightSource",
    "compare_modules",
    "compare_with_base",
    "gather_verified",
    "mismatch_message",
    "refuse_mismatches",
    "verify",
]


class WeightSource(Protocol):
    """Anything that gives a base's pristine weights by module name, ``(out, in)``."""

    def shape(self, module: str) -> tuple[int, int]: ...

    def weight(self, module: str) -> Tensor: ...


@dataclass(frozen=True)
class BaseComparison:
    """An adapter's modules compared with a base."""

    mismatches: list[str]
    """Each module that the base does not hold as the adapter says, and why."""
    norm_bounds: dict[str, float]
    """:func:`~secura_serve.adapter.limits.update_norm_bound` of each module that was read."""


def gather_verified(
    W: Tensor, basis: Basis, expected: str | None, *, compare: bool = True
) -> tuple[tuple[Tensor, Tensor] | None, str | None]:
    """Gather C ``(out, r)`` and R ``(r, in)`` from W and compare them with a fingerprint.

    Args:
        W: ``(out, in)``.
        expected: the fingerprint of the adapter's base; None matches nothing.
        compare: False where W is known to be right.

    Returns:
        C and R, or None; why W is not the weight that the adapter was trained on, or None.
    """
    if problem := _index_problem((W.shape[0], W.shape[1]), basis):
        return None, problem
    C, R = gather(W, basis)
    if compare and fingerprint_of(C, R, basis) != expected:
        return (C, R), "the base holds other weights"
    return (C, R), None


def _index_problem(shape: tuple[int, int], basis: Basis) -> str | None:
    if int(basis.rows.max()) < shape[0] and int(basis.cols.max()) < shape[1]:
        return None
    return f"indices beyond the base's shape {shape}"


def compare_modules(
    modules: Mapping[str, CURModule],
    fingerprints: Mapping[str, str],
    base: WeightSource,
    *,
    read: Collection[str] | None = None,
) -> BaseComparison:
    """Compare modules with a base; C and R of each are gathered once.

    Args:
        fingerprints: module -> that of the weight it was trained on.
        read: the modules whose weights are read; of the others only names and shapes are
            compared. None reads all.
    """
    mismatches, norm_bounds = [], {}
    for name, cur in modules.items():
        try:
            shape = base.shape(name)
        except (KeyError, BaseModelError):
            mismatches.append(f"{name}: the base has no such linear layer")
            continue
        problem = _index_problem(shape, cur.basis)
        if problem is None and (read is None or name in read):
            gathered, problem = gather_verified(
                base.weight(name), cur.basis, fingerprints.get(name)
            )
            if gathered is not None:
                norm_bounds[name] = update_norm_bound(*gathered)
        if problem is not None:
            mismatches.append(f"{name}: {problem}")
    return BaseComparison(mismatches, norm_bounds)


def compare_with_base(
    adapter: Adapter, base: WeightSource, *, read: Collection[str] | None = None
) -> BaseComparison:
    """Compare an adapter with a base, see :func:`compare_modules`."""
    return compare_modules(adapter.modules, adapter.config.base_fingerprint, base, read=read)


def verify(adapter: Adapter, base: WeightSource) -> None:
    """Check that ``adapter`` was trained on ``base``, by fingerprint.

    Raises:
        BaseMismatchError: naming the first differing module, and how many differ.
    """
    refuse_mismatches(adapter, compare_with_base(adapter, base).mismatches)


def refuse_mismatches(adapter: Adapter, mismatches: Sequence[str]) -> None:
    """Raise BaseMismatchError if a comparison of ``adapter`` with its base has mismatches."""
    if mismatches:
        raise BaseMismatchError(
            mismatch_message(
                adapter.name, adapter.config.base_model_name_or_path, mismatches, "Serve it with"
            )
        )


def mismatch_message(who: str, trained_on: str, mismatches: Sequence[str], todo: str) -> str:
    """Return the words for an adapter on the wrong base: the first module, and how many differ."""
    more = f" (and {len(mismatches) - 1} more modules)" if len(mismatches) > 1 else ""
    return (
        f"{who} was trained on another base ({trained_on}): {mismatches[0]}{more}. "
        f"{todo} that base, or train it again on this one"
    )
