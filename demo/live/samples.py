"""What ``/metrics`` says, and how it changed since it was last asked."""

from __future__ import annotations

import math
import time
from collections import deque
from dataclasses import dataclass, field

from prometheus_client.parser import text_string_to_metric_families

from ..server import Refused, Server

__all__ = ["History", "Sample", "read"]

KEPT = 150
_FRESH_S = 1.0
GAP_S = 8.0
"""Nobody looked for so long: what was in between is not known."""


@dataclass(frozen=True)
class Sample:
    """The numbers of one moment; `at` is in seconds."""

    at: float
    numbers: dict[str, float] = field(default_factory=dict)
    """Name -> value, added up over all labels."""
    by_label: dict[str, dict[str, float]] = field(default_factory=dict)
    """Name -> state or adapter -> value."""


def read(text: str, at: float) -> Sample:
    """Read Prometheus' text. Raises ValueError if it is none."""
    numbers: dict[str, float] = {}
    by_label: dict[str, dict[str, float]] = {}
    for family in text_string_to_metric_families(text):
        for each in family.samples:
            numbers[each.name] = numbers.get(each.name, 0.0) + each.value
            for label in ("adapter", "state"):
                if label in each.labels:
                    values = by_label.setdefault(each.name, {})
                    key = each.labels[label]
                    values[key] = values.get(key, 0.0) + each.value
    return Sample(at, numbers, by_label)


@dataclass
class History:
    """The samples of the last minutes, which all visitors of the page share."""

    server: Server
    samples: deque[Sample] = field(default_factory=lambda: deque(maxlen=KEPT))
    problem: str | None = None
    _asking: bool = False

    async def sample(self) -> None:
        """Ask the server, unless somebody just did."""
        latest = self.samples[-1].at if self.samples else float("-inf")
        if self._asking or time.monotonic() - latest < _FRESH_S:
            return
        self._asking = True
        try:
            self.samples.append(read(await self.server.metrics(), time.monotonic()))
            self.problem = None
        except Refused as refused:
            self.problem = str(refused)
        except ValueError:
            self.problem = "This server's /metrics are not Prometheus' text."
        finally:
            self._asking = False

    def rates(self, name: str) -> list[tuple[float, float]]:
        """Return (seconds ago, increase per second).

        A restart, which counts anew, is left out; where nobody asked for a while the rate is NaN.
        """
        found, now = [], self.samples[-1].at if self.samples else 0.0
        for before, after in zip(self.samples, list(self.samples)[1:], strict=False):
            more = after.numbers.get(name, 0.0) - before.numbers.get(name, 0.0)
            took = after.at - before.at
            if more >= 0:
                found.append((after.at - now, more / took if took <= GAP_S else math.nan))
        return found
