"""How much memory serving is expected to take, told before it is taken."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from secura_serve.checkpoint import Checkpoint
from secura_serve.serve.app.adapters.content.plain_lora import PlainLoRA
from secura_serve.serve.app.adapters.resident.plan import place_nbytes
from secura_serve.serve.app.adapters.resident.slots import ResidentSpec
from secura_serve.serve.basis import SharedBasis
from secura_serve.system.host_memory import available_memory

__all__ = ["Memory", "default_cached", "default_slots", "estimate", "kv_cache_gib"]

_WIDTHS = {"float32": 4, "float": 4}
_FEWEST, _SHARE = 8, 20
NO_PLACES = ResidentSpec(0, "int8", ())


@dataclass(frozen=True)
class Memory:
    """Bytes by purpose."""

    weights: int
    """All tensors of the checkpoint in the dtype they are served in."""
    slot: int
    """One adapter slot: U of every linear, and A and B where plain LoRA is served."""
    slots: int
    """Number of slots, the empty one included."""
    shared: int
    """C of every linear, kept once for all adapters."""
    kv_per_token: int
    """Keys and values of one token."""
    place: int
    """The update of one full-rank adapter."""
    places: int
    context: int
    """The longest sequence the base allows, in tokens."""

    def __str__(self) -> str:
        adapters = self.slot * self.slots + self.shared
        places = (
            f" + {self.places} place{'' if self.places == 1 else 's'} for full-rank adapters of "
            f"{self.place / 2**20:.1f} MiB"
            if self.places
            else ""
        )
        kv = os.environ.get("VLLM_CPU_KVCACHE_SPACE")
        cache = f"KV cache {kv} GiB" if kv else "KV cache by --gpu-memory-utilization"
        return (
            f"base {self.weights / 2**20:.0f} MiB + adapters {adapters / 2**20:.1f} MiB "
            f"({self.slots - 1} slots and an empty one of {self.slot / 2**20:.2f} MiB, basis "
            f"{self.shared / 2**20:.1f} MiB){places} + {cache} "
            f"({self.kv_per_token / 2**10:.1f} KiB a token) + vLLM's processes themselves"
        )


def estimate(
    base: Checkpoint,
    basis: SharedBasis,
    loras: Sequence[PlainLoRA] = (),
    *,
    slots: int = 0,
    dtype: str = "auto",
    resident: ResidentSpec = NO_PLACES,
) -> Memory:
    """Return sizes from the checkpoint's headers and config alone.

    Args:
        loras: plain LoRAs that are served as well: every slot has room for the widest.
        slots: ``--max-loras``.
        resident: the places for full-rank adapters.
        dtype: ``--dtype``; float32 counts 4 bytes a number, everything else 2.
    """
    width = _WIDTHS.get(dtype, 2)
    config = base.config
    heads = config.get("num_attention_heads") or config.get("n_head") or 1
    hidden = config.get("hidden_size") or config.get("n_embd") or 0
    layers = config.get("num_hidden_layers") or config.get("n_layer") or 0
    kv_heads = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or hidden // heads
    sizes = {m: max(len(b.rows), len(b.cols)) for m, b in basis.modules.items()}
    widest = max((lora.r for lora in loras), default=0)
    plain = sum(widest * sum(base.shape(m)) for m in {m for lora in loras for m in lora.modules})
    return Memory(
        weights=_weights(base) * width,
        slot=(sum(r * r for r in sizes.values()) + plain) * width,
        slots=slots + 1,
        shared=sum(r * base.shape(m)[0] for m, r in sizes.items()) * width,
        kv_per_token=2 * layers * kv_heads * head_dim * width,
        place=place_nbytes(resident.modules, resident.dtype, base),
        places=resident.count,
        context=config.get("max_position_embeddings") or config.get("n_positions") or 0,
    )


def _weights(base: Checkpoint) -> int:
    """Return how many numbers the checkpoint holds, from the sizes of its files."""
    stored = base.config.get("dtype") or base.config.get("torch_dtype")
    size = sum((base.path / shard).stat().st_size for shard in base.shards())
    return size // _WIDTHS.get(str(stored), 2)


def default_slots(adapters: int, slot: int) -> int:
    """Return slots for all adapters, as far as a twentieth of the device's memory holds them.

    Args:
        slot: bytes of one.
    """
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        return default_cached(adapters, slot)
    return _fitting(adapters, slot, current_platform.get_device_total_memory())


def default_cached(adapters: int, slot: int) -> int:
    """Return how many adapters a worker keeps ready for a slot, as far as a twentieth of the
    machine's free memory holds them; any other is read from its folder again."""
    return _fitting(adapters, slot, available_memory())


def _fitting(adapters: int, slot: int, memory: int) -> int:
    return max(_FEWEST, min(adapters, int(memory) // _SHARE // max(1, slot)))


def kv_cache_gib(memory: Memory) -> int:
    """Return the KV cache on a CPU where the user set none: four full contexts, 1 to 8 GiB."""
    return min(8, max(1, ceil(4 * memory.context * memory.kv_per_token / 2**30)))
