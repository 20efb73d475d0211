"""How many places for full-rank adapters an engine gets, and for which linears."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from secura_serve.checkpoint import Checkpoint
from secura_serve.serve.app.adapters.resident.slots import ResidentSpec
from secura_serve.serve.delta_image import image_nbytes
from secura_serve.system.host_memory import available_memory


class Changes(Protocol):
    """What a place is for: an adapter or a fine-tune."""

    @property
    def modules(self) -> Mapping[str, Any]:
        """The linears that it changes."""


__all__ = ["place_nbytes", "plan_resident"]

_SHARE = 10


def plan_resident(
    count: int | None, dtype: str, full_rank: Sequence[Changes], base: Checkpoint
) -> ResidentSpec:
    """Return the places of an engine.

    They hold the linears that any of the adapters changes; without adapters, all linears.

    Args:
        count: ``--resident``; None is one for each adapter, as far as a tenth of the memory holds
            them.
        dtype: ``int8`` or ``float32``.
        full_rank: the adapters that would use them.
    """
    changed = {module for adapter in full_rank for module in adapter.modules}
    modules = tuple(m for m in base.linears() if m in changed or not full_rank)
    if count is None:
        fitting = _memory() // _SHARE // max(1, place_nbytes(modules, dtype, base))
        count = min(len(full_rank), fitting)
    return ResidentSpec(count, dtype, modules if count else ())


def place_nbytes(modules: Sequence[str], dtype: str, base: Checkpoint) -> int:
    """Return the bytes of one place: Σ out·in·width + 4·out over its linears."""
    return image_nbytes((base.shape(module) for module in modules), dtype)


def _memory() -> int:
    """Return the free memory of this machine, or all of a device's."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        return available_memory()
    return int(current_platform.get_device_total_memory())
