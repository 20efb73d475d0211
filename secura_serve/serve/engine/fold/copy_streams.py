"""Copies beside the folds: one stream of a device brings weights, another folds what has come."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["CopyStreams"]


class CopyStreams:
    """Queues copies beside the work of the current stream; on a CPU the caller copies.

    What a copy overwrites must not be in use: making this waits for all that the device was told.
    """

    def __init__(self, device: torch.device) -> None:
        self._bus = None
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            self._bus = torch.cuda.Stream(device)

    def copy(self, to: Tensor, source: Tensor) -> None:
        """Queue a copy; what the caller queues from here on waits for it, other copies do not."""
        if self._bus is None:
            to.copy_(source)
            return
        with torch.cuda.stream(self._bus):
            to.copy_(source, non_blocking=True)
            arrived = self._bus.record_event()
        torch.cuda.current_stream(to.device).wait_event(arrived)
