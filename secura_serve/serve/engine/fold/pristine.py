"""The base's own weights for a fold on a GPU: read once, then kept where the bus is fast.

Memory that the operating system may move is copied to a GPU piece by piece while the processor
waits. So what a fold has read stays in pinned memory as far as there is room; the next fold, and
the one that puts the base back, only queue copies, and the fold's kernels behind them. Here are
the linears that go through vLLM's reload, whole; of those that are folded in place a rank keeps its
own part (:mod:`~secura_serve.serve.engine.fold.shards`), in the same room.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor
from vllm.logger import init_logger

from secura_serve.checkpoint import Checkpoint
from secura_serve.system.host_memory import available_memory

__all__ = ["PristineCopies", "file_stamp"]

logger = init_logger("vllm.secura_serve")


class PristineCopies:
    """Tensors of one base in pinned memory.

    Args:
        ranks: how many workers of this machine keep copies of their own.
        room: bytes to keep at most; by default half of the memory that is free at the first
            fold, shared among ``ranks``.
        pin: makes a pinned copy.
    """

    def __init__(
        self,
        ranks: int = 1,
        room: int | None = None,
        pin: Callable[[Tensor], Tensor] = Tensor.pin_memory,
    ) -> None:
        self._ranks, self._room, self._pin = ranks, room, pin
        self._stamp: object = None
        self._held: dict[str, list[tuple[str, Tensor]]] = {}
        self._lent = 0

    @property
    def nbytes(self) -> int:
        """Bytes that are kept."""
        return self._lent + _taken(t for held in self._held.values() for _, t in held)

    def left(self) -> int:
        """Return the bytes that there is still room for."""
        if self._room is None:
            # What the page cache gives up counts: after loading, that is most of the memory.
            self._room = available_memory() // 2 // self._ranks
        return self._room - self.nbytes

    def lend(self, *tensors: Tensor) -> tuple[Tensor, ...] | None:
        """Return pinned copies for somebody else to keep; None without room for all of them."""
        nbytes = _taken(tensors)
        copies = self._pinned(*tensors) if nbytes <= self.left() else None
        if copies is not None:
            self._lent += nbytes
        return copies

    def give_back(self, tensors: Iterable[Tensor]) -> None:
        """Count what was lent as free again."""
        self._lent -= _taken(tensors)

    def _pinned(self, *tensors: Tensor) -> tuple[Tensor, ...] | None:
        """Return pinned copies; None where the system refuses, which is not asked for more then."""
        try:
            return tuple(self._pin(tensor) for tensor in tensors)
        except RuntimeError as error:
            logger.warning("folds: no more memory can be pinned: %s", error)
            self._room = self.nbytes
            return None

    def stream(
        self, base: Checkpoint, modules: Sequence[str], device: torch.device
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield name and tensor, on ``device``, of each module's weight and bias.

        First those that are kept, then the others in the order of the files. What was read of
        files that have changed since is read again.
        """
        if (stamp := file_stamp(base)) != self._stamp:
            self._held, self._stamp = {}, stamp
        kept = [module for module in modules if module in self._held]
        for module in kept:
            for name, tensor in self._held[module]:
                yield name, tensor.to(device, non_blocking=True)
        left = self.left()
        read: dict[str, list[tuple[str, Tensor]]] = {}
        partial = set[str]()
        for name, tensor in base.tensors([m for m in modules if m not in self._held]):
            module = name.rpartition(".")[0]
            left -= _taken([tensor])
            if partial or left < 0 or (pinned := self._pinned(tensor)) is None:
                partial.add(module)
                yield name, tensor.to(device)
                continue
            read.setdefault(module, []).append((name, pinned[0]))
            yield name, pinned[0].to(device, non_blocking=True)
        # Only now: a consumer that ends early leaves no module half read.
        self._held |= {module: held for module, held in read.items() if module not in partial}
        if partial:
            logger.warning(
                "folds: there is no room to keep all of the base in pinned memory; some of it is "
                "read from its files each time"
            )


def _taken(tensors: Iterable[Tensor]) -> int:
    """Return the bytes that pinned copies take: torch hands them out in powers of two."""
    return sum(1 << (t.nbytes - 1).bit_length() for t in tensors if t.nbytes)


def file_stamp(base: Checkpoint) -> object:
    """Say which files the base's tensors come from, and when they were written."""
    files = ((shard, (base.path / shard).stat()) for shard in base.shards())
    return tuple((shard, stat.st_mtime_ns, stat.st_size) for shard, stat in files)
