"""A rank's part of the plain linears, folded where it lies.

While the engine holds the base, the parameter itself is the pristine W: a fold reads it there and
writes W' there, and nothing but C and R (a hundredth of W) comes over the bus. The way back is, in
this order, the journal that a fold with ``bounded`` leaves in the device's memory where there is
room, the part's pinned copy, and the base's files. From one adapter to the next both ways are taken
in the same two launches.

Which part a rank holds is asked of vLLM (:func:`~secura_serve.serve.compat.find_param_shards`) and
believed once the parameter, with the base in it, has been compared with the files bit for bit. All
else goes through vLLM's reload, and so does everything where a mode needs to see all of W.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from secura_serve.checkpoint import Checkpoint
from secura_serve.errors import MergeError
from secura_serve.merge import (
    FoldPlan,
    Gathered,
    Journal,
    Part,
    Target,
    bits_to_keep,
    fold_shard,
    folds_by_shard,
    gather_shard,
    undo_shard,
)
from secura_serve.serve import compat
from secura_serve.serve.engine.fold.copy_streams import CopyStreams
from secura_serve.serve.engine.fold.pristine import PristineCopies, file_stamp

__all__ = ["Shards"]

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_COMPARED_BYTES = 16 << 20


@dataclass
class _Shard:
    """One linear: where it lies, and how its W comes back."""

    param: compat.ParamShard | None
    """None: not in one piece, or not as it was thought; vLLM's reload has to do it."""
    known: bool = False
    """The parameter was compared with the files."""
    moved: bool = False
    """What lies there may be anything but W."""
    journal: Journal | None = None
    pinned: Tensor | None = None


class Shards:
    """The plain linears of one worker.

    Args:
        siblings: adds to modules whatever the engine packs with them.
        copies: gives pinned memory.
        journal_room: bytes of journals to keep at most; by default half of the device's memory
            that is free at the first fold, which is what vLLM has left for others.
    """

    def __init__(
        self,
        model: Any,
        base: Checkpoint,
        siblings: Callable[[Iterable[str]], Sequence[str]],
        copies: PristineCopies,
        journal_room: int | None = None,
    ) -> None:
        self._siblings, self._copies, self._journal_room = siblings, copies, journal_room
        self._model, self._stamp = model, file_stamp(base)
        self._shards: dict[str, _Shard] = {}
        self._gathered: dict[object, Gathered] = {}

    def take(self, base: Checkpoint, plan: FoldPlan, modules: Iterable[str]) -> list[str]:
        """Return those of ``modules`` that :meth:`put` can do; reads what it has not seen yet.

        A linear that vLLM's reload has to do takes along whatever is packed with it.
        """
        if (stamp := file_stamp(base)) != self._stamp:
            self._forget(stamp)
        near, wanted = self._siblings(modules), set(modules)
        self._find(base, [m for m in near if m not in self._shards])
        if not all(folds_by_shard(target, plan.norm) for target in plan.targets.values()):
            return []
        self._compare(base, near)
        others = self._siblings(m for m in near if not self._shards[m].known)
        return [m for m in near if m in wanted.difference(others)]

    def put(self, base: Checkpoint, plan: FoldPlan, modules: Sequence[str]) -> int:
        """Put W' of the plan, or W where it has no target, in place; return the bytes that change.

        Args:
            modules: what :meth:`take` returned.

        Raises:
            MergeError: another base, before anything changes; or NaN or Inf in W'.
        """
        if not modules:
            return 0
        targets = {t.module: t for t in plan.targets.values() if t.module in set(modules)}
        gathered = self._gather(base, plan, targets)
        device = self._param(modules[0]).held.device
        flags = torch.zeros(len(modules), 2, dtype=torch.int32, device=device)
        kept: dict[str, Journal | None] = {}
        streams = CopyStreams(device)
        for module, flag in zip(modules, flags, strict=True):
            shard, target = self._shards[module], targets.get(module)
            held, old = self._param(module).held, shard.journal
            if shard.moved and old is None:
                streams.copy(held, self._pristine(base, module))
            # Whatever happens from here on, what lies there does not go with a journal.
            shard.moved, shard.journal = True, None
            if target is not None:
                bits = bits_to_keep(held, target, plan.norm)
                kept[module] = new = self._new_journal(held, bits, old, kept.values())
                parts = gathered[module].map(lambda t: t.to(device, non_blocking=True))
                fold_shard(held, target, plan.norm, parts, flag, old, new)
            elif old is not None:
                undo_shard(held, old, flag)
        # The one time that this waits for the device.
        found = dict(zip(modules, flags.tolist(), strict=True))
        if bad := [m for m, (infinite, _) in found.items() if infinite and m in targets]:
            dtype = self._param(bad[0]).held.dtype
            raise MergeError(
                "the fold was abandoned; use the base that the adapter was trained on, undamaged, "
                "and a weight and a dtype that can hold the result:",
                [f"{m}: NaN or Inf in the base, or beyond {dtype}" for m in bad],
            )
        for module, (_, too_narrow) in found.items():
            self._shards[module].moved = module in targets
            self._shards[module].journal = None if too_narrow else kept.get(module)
        return sum(self._param(m).held.nbytes for m in modules)

    def reloaded(self, modules: Iterable[str], moved: Iterable[str]) -> None:
        """Say what vLLM's reload has written, and which of it is not the base."""
        for module in self._shards.keys() & set(modules):
            shard = self._shards[module]
            shard.moved, shard.journal = module in set(moved), None

    def _forget(self, stamp: object) -> None:
        """Know nothing of the base any more, because its files have changed."""
        kept = [shard.pinned for shard in self._shards.values() if shard.pinned is not None]
        kept += [t for gathered in self._gathered.values() for side in gathered for t in side]
        self._copies.give_back(kept)
        self._gathered, self._stamp = {}, stamp
        for shard in self._shards.values():
            shard.known, shard.journal, shard.pinned = False, None, None

    def _find(self, base: Checkpoint, modules: Sequence[str]) -> None:
        """Ask vLLM where linears lie."""
        weights = ((base.tensor_name(m), W, base.is_conv1d(m)) for m, W in _weights(base, modules))
        params = compat.find_param_shards(self._model, weights)
        self._shards |= {m: _Shard(params.get(base.tensor_name(m))) for m in modules}

    def _compare(self, base: Checkpoint, modules: Iterable[str]) -> None:
        """Compare with the files what holds the base and was not compared yet; keep a copy."""
        new = [m for m in modules if not (self._shards[m].known or self._shards[m].moved)]
        for module, tensor in _weights(base, [m for m in new if self._shards[m].param]):
            shard = self._shards[module]
            assert shard.param is not None
            W = _part(base, module, tensor, shard.param)
            if _same_bits(shard.param.held, W):
                shard.known, (shard.pinned,) = True, self._copies.lend(W) or (None,)
            else:
                shard.param = None

    def _param(self, module: str) -> compat.ParamShard:
        param = self._shards[module].param
        assert param is not None, module
        return param

    def _pristine(self, base: Checkpoint, module: str) -> Tensor:
        if (pinned := self._shards[module].pinned) is not None:
            return pinned
        ((_, tensor),) = _weights(base, [module])
        return _part(base, module, tensor, self._param(module))

    def _gather(
        self, base: Checkpoint, plan: FoldPlan, targets: dict[str, Target]
    ) -> dict[str, Gathered]:
        """Return C and R of every target's parts; those of a basis that was seen are kept."""
        missing = [
            m for m, t in targets.items() if any(_key(m, p) not in self._gathered for p in t.parts)
        ]
        fresh, problems = dict[object, Gathered](), list[str]()
        for module, tensor in _weights(base, missing):
            target, param = targets[module], self._param(module)
            got, faults = gather_shard(tensor, target, param.rows, param.cols, checked=plan.checked)
            problems += faults
            if not faults:
                for part, C, R in zip(target.parts, *got, strict=True):
                    fresh[_key(module, part)] = Gathered((C,), (R,))
        if problems:
            raise MergeError(
                "the fold was abandoned, use the base that the adapter was trained on:", problems
            )
        for key, (Cs, Rs) in fresh.items():
            if (pinned := self._copies.lend(*Cs, *Rs)) is not None:
                self._gathered[key] = fresh[key] = Gathered(pinned[:1], pinned[1:])
        every = self._gathered | fresh
        return {
            m: Gathered(*(tuple(every[_key(m, p)][side][0] for p in t.parts) for side in (0, 1)))
            for m, t in targets.items()
        }

    def _new_journal(
        self, held: Tensor, bits: int, old: Journal | None, others: Iterable[Journal | None]
    ) -> Journal | None:
        """Return what a fold is to write into: the old one, a new one, or None without room."""
        if not bits or (old is not None and old.bits == bits):
            return old if bits else None
        if self._journal_room is None:
            self._journal_room = torch.cuda.mem_get_info(held.device)[0] // 2
        live = [shard.journal for shard in self._shards.values()] + [*others]
        used = sum(journal.data.nbytes for journal in live if journal is not None)
        if used + Journal.nbytes(held, bits) > self._journal_room:
            return None
        try:
            return Journal.empty(held, bits)
        except torch.OutOfMemoryError:
            # Somebody else has taken what was free at the first fold.
            self._journal_room = used
            return None


def _weights(base: Checkpoint, modules: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
    """Yield each module and its weight as the file has it, in the order of the files."""
    names = {base.tensor_name(module): module for module in modules}
    return ((names[name], W) for name, W in base.tensors(modules) if name in names)


def _part(base: Checkpoint, module: str, tensor: Tensor, param: compat.ParamShard) -> Tensor:
    W = tensor.T if base.is_conv1d(module) else tensor
    return W[param.rows, param.cols].contiguous()


def _key(module: str, part: Part) -> object:
    """Name C and R of a basis: the fingerprint for what they hold, the indices for what it says."""
    return module, part.fingerprint, *(index.numpy().tobytes() for index in part.basis)


def _same_bits(held: Tensor, W: Tensor) -> bool:
    """Compare a few rows at a time: the device may have no room for a second linear."""
    view, rows = _BITS[W.itemsize], max(1, _COMPARED_BYTES // W[:1].nbytes)
    pieces = zip(held.view(view).split(rows), W.view(view).split(rows), strict=True)
    return all(torch.equal(here, there.to(held.device)) for here, there in pieces)
