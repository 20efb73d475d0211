"""What happens to the adapters of a running server, for whoever counts it."""

from __future__ import annotations

from typing import Literal

from secura_serve.errors import SecuraError

__all__ = ["Observer", "WatchEvent"]

WatchEvent = Literal["added", "updated", "removed", "refused"]
"""What became of a change in the adapters folder."""


class Observer:
    """Is told what happens, and does nothing; ``Metrics`` counts it."""

    def adapter_read(self, seconds: float) -> None:
        """Take note that the workers have read an adapter."""

    def place_filled(self, seconds: float) -> None:
        """Take note that the update of a full-rank adapter was copied into a place."""

    def place_taken(self) -> None:
        """Take note that a full-rank adapter left its place to make room for another."""

    def adapter_refused(self, error: SecuraError) -> None:
        """Take note that some content of an adapter is not served."""

    def folder_changed(self, event: WatchEvent) -> None:
        """Take note of what became of a change in the adapters folder."""

    def weights_folded(self, seconds: float) -> None:
        """Take note that an adapter was folded into the weights, or out of them."""
