"""``Replay``: experience replay from a reservoir of earlier examples."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from secura_serve.train.data import Rows, mix
from secura_serve.train.strategy import Strategy

__all__ = ["Replay", "Reservoir"]


class Reservoir:
    """A uniform sample of ``size`` of all rows ever offered, whatever their number.

    Algorithm R: row number n (from 1) is taken while there is room, else with probability
    size/n, in the place of one drawn uniformly (Vitter, "Random sampling with a reservoir", ACM
    TOMS 11(1), 1985). The draw depends on the seed and n alone.
    """

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed, self.seen = size, seed, 0
        self.rows: Rows = []

    def offer(self, rows: Rows) -> None:
        """Offer rows in their order."""
        for row in rows:
            self.seen += 1
            if len(self.rows) < self.size:
                self.rows.append(row)
            elif (at := random.Random(f"{self.seed}|{self.seen}").randrange(self.seen)) < self.size:
                self.rows[at] = row


class Replay(Strategy):
    """ER: a share of examples of earlier tasks among the new ones.

    They come from a :class:`Reservoir` (Chaudhry et al., "On Tiny Episodic Memories in Continual
    Learning", arXiv 1902.10486). A task of N examples gets round(share·N) of them, drawn once,
    without repetition as far as the buffer goes.
    """

    def __init__(self, size: int, share: float, seed: int) -> None:
        self.buffer, self.share, self.seed = Reservoir(size, seed), share, seed

    def rows(self, new: Rows) -> Rows:
        """``new`` and the replayed rows, which are marked ``replayed``."""
        earlier = [row | {"replayed": [1]} for row in self.buffer.rows]
        # Another draw for each task, the same one whether the run was resumed or not.
        return mix(new, earlier, self.share, self.seed + self.buffer.seen)

    def finish(self, new: Rows) -> None:
        """Offer the task's rows to the buffer."""
        self.buffer.offer(new)

    def facts(self) -> dict[str, Any]:
        """The buffer."""
        return {"rows": self.buffer.rows, "seen": self.buffer.seen}

    def load(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """The buffer as it was."""
        self.buffer.rows, self.buffer.seen = list(facts["rows"]), int(facts["seen"])
