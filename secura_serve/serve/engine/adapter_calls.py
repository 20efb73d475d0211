"""The worker's half of the adapters' life cycle: called on every rank between two steps.

Mixed into vLLM's worker beside folding (see ``worker_extension.py``). Only preparing reads files;
whatever can be wrong with an adapter shows there and fails that call alone, on whichever ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm.logger import init_logger

from secura_serve.errors import SecuraError
from secura_serve.serve import compat
from secura_serve.serve.delta_image import DeltaImage
from secura_serve.serve.engine.deltas import DeltaModel
from secura_serve.serve.engine.ranks import on_every_rank

__all__ = ["AdapterCalls"]

logger = init_logger("vllm.secura_serve")


class AdapterCalls:
    """Methods that vLLM adds to each worker."""

    model_runner: Any

    @on_every_rank
    def secura_prepare(
        self, adapters: Sequence[tuple[str, str]], norm_bounds: Mapping[str, Mapping[str, float]]
    ) -> list[str | None]:
        """Read adapters, and keep what a slot needs of them.

        Args:
            adapters: name and folder of each; the folder names the content.
            norm_bounds: of each ``base_id`` that the server has compared with the base: module ->
                bound of the update's norm.

        Returns:
            For each, None or why this engine cannot serve it.
        """
        manager = compat.worker_adapters(self.model_runner)
        refused: list[str | None] = []
        for name, path in adapters:
            try:
                manager.keep(name, path, norm_bounds)
                refused.append(None)
            except Exception as error:
                refused.append(_reason(error))
        return refused

    @on_every_rank
    def secura_forget(self, numbers: Sequence[int], paths: Sequence[str]) -> None:
        """Free the slots of adapters that nobody asks for any more, and what was kept of them.

        Args:
            numbers: their ``lora_int_id``.
            paths: their folders.
        """
        manager = compat.worker_adapters(self.model_runner)
        compat.model_manager(manager).pinned -= set(numbers)
        for number in numbers:
            manager.remove_adapter(number)
        for path in paths:
            manager.drop(path)

    @on_every_rank
    def secura_fill(self, place: int, path: str, first: int, last: int) -> str | None:
        """Copy modules of a delta image into a place, which no request may use meanwhile.

        Args:
            path: the image's folder.
            first, last: which of its modules; 0 is the first call.

        Returns:
            None, or why it cannot be done.
        """
        worker_manager = compat.worker_adapters(self.model_runner)
        manager = compat.model_manager(worker_manager)
        try:
            if first == 0:
                _vacate(worker_manager, place)
            manager.deltas.fill(place, DeltaImage.open(Path(path)), first, last)
        except Exception as error:
            return _reason(error)
        return None

    @on_every_rank
    def secura_publish(self, place: int, path: str) -> None:
        """Have the adapter of a delta image be answered from a place that is filled."""
        compat.worker_adapters(self.model_runner).keep_delta(path, place)

    @on_every_rank
    def secura_slots(self) -> tuple[list[int], int, int]:
        """Return the ``lora_int_id`` of every adapter that is in a slot, and how many adapters were
        put into one, or had to leave one for another, since the start."""
        worker_manager = compat.worker_adapters(self.model_runner)
        manager = compat.model_manager(worker_manager)
        return compat.resident(worker_manager), manager.loads, manager.evictions

    @on_every_rank
    def secura_pin(self, name: str, number: int, path: str, pinned: bool) -> str | None:
        """Keep an adapter in a slot, or no longer; return why that cannot be done, or None."""
        worker_manager = compat.worker_adapters(self.model_runner)
        manager = compat.model_manager(worker_manager)
        if not pinned:
            manager.pinned.discard(number)
            return None
        if len(manager.pinned - {number}) + 1 >= manager.lora_slots:
            return (
                f"one of the {manager.lora_slots} slots must stay free for the other adapters; "
                "unpin one, or restart with more --max-loras"
            )
        try:
            worker_manager.add_adapter(compat.lora_request(name, number, path))
        except Exception as error:
            return _reason(error)
        manager.pinned.add(number)
        return None


def _vacate(worker_manager: Any, place: int) -> None:
    """Unregister whatever still stands for a place: where the call that was to forget it did not
    get through to every rank, it would be answered with the next update in there."""
    manager = compat.model_manager(worker_manager)
    for number in list(compat.registered_adapters(manager).order):
        model = compat.registered_adapter(manager, number)
        if isinstance(model, DeltaModel) and model.place == place:
            worker_manager.remove_adapter(number)


def _reason(error: Exception) -> str:
    """Return why a call is refused."""
    if isinstance(error, (SecuraError, ValueError, RuntimeError)) and str(error):
        return str(error)
    # What nobody has thought of is not always said in a sentence.
    logger.exception("an adapter is refused")
    return repr(error)
