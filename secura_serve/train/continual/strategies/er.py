"""``Replay``: experience replay from a reservoir of earlier examples."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from secura_serve.train.continual.strategies.base import Strategy
from secura_serve.train.data import Rows, mix

if TYPE_CHECKING:
    from secura_serve.train.continual.config import SequenceConfig
    from secura_serve.train.methods.prepared import PreparedModel

__all__ = ["Replay", "Reservoir"]


class Reservoir:
    """A buffer of ``size`` rows, drawn uniformly from all rows ever offered.

    Algorithm R: row number n (from 1) is kept while there is room, else with probability size/n,
    and then replaces a row drawn uniformly (Vitter, "Random sampling with a reservoir", ACM TOMS
    11(1), 1985). The draw depends on the seed and n alone.
    """

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed, self.seen = size, seed, 0
        self.rows: Rows = []

    def offer(self, rows: Rows) -> None:
        """Offer rows, in their order."""
        for row in rows:
            self.seen += 1
            if len(self.rows) < self.size:
                self.rows.append(row)
            elif (at := random.Random(f"{self.seed}|{self.seen}").randrange(self.seen)) < self.size:
                self.rows[at] = row


class Replay(Strategy):
    """ER: examples of earlier tasks are trained on among the new ones.

    They come from a :class:`Reservoir` (Chaudhry et al., "On Tiny Episodic Memories in Continual
    Learning", arXiv 1902.10486). A task of N examples gets round(share·N) of them, drawn once; a
    row is drawn twice only after all the others have been drawn.
    """

    def __init__(self, size: int, share: float, seed: int) -> None:
        self.buffer, self.share, self.seed = Reservoir(size, seed), share, seed

    @classmethod
    def from_config(cls, config: SequenceConfig, prepared: PreparedModel) -> Replay:
        """Return the strategy with its settings of ``config``."""
        return cls(config.replay, config.replay_share, config.seed)

    def rows(self, new: Rows) -> Rows:
        """Return ``new`` and the replayed rows, which are marked ``replayed``."""
        earlier = [row | {"replayed": [1]} for row in self.buffer.rows]
        # Each task draws anew, and a resumed run draws the same.
        return mix(new, earlier, self.share, self.seed + self.buffer.seen)

    def finish(self, new: Rows) -> None:
        """Offer the task's rows to the buffer."""
        self.buffer.offer(new)

    def facts(self) -> dict[str, Any]:
        """Return the buffer."""
        return {"rows": self.buffer.rows, "seen": self.buffer.seen}

    def load(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Put the buffer back."""
        self.buffer.rows, self.buffer.seen = list(facts["rows"]), int(facts["seen"])
