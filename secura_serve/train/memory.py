"""The memory of a run: estimated before it starts, measured at its end."""

from __future__ import annotations

import resource
from dataclasses import dataclass

import psutil
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from secura_serve.system.host_memory import available_memory
from secura_serve.train.data import IGNORE, Rows
from secura_serve.train.loop.prefix import can_share, causal_lm, shared_length
from secura_serve.train.methods.prepared import PreparedModel
from secura_serve.train.retention import Retention
from secura_serve.train.settings import REPRODUCTION_ONLY

__all__ = ["Memory", "available", "estimate", "peak", "resident"]

GIB = 2**30
# By how much a CPU process grew beyond its tensors in runs of SmolLM2-135M: libraries loaded on
# first use, scratch memory of kernels, memory that the allocator keeps.
_CPU_OVERHEAD = GIB


@dataclass(frozen=True)
class Memory:
    """Bytes of one process."""

    weights: int
    training: int
    activations: int
    overhead: int
    retention: int = 0
    """The extra activations of ``--retain``, and the base's targets."""

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return self.weights + self.training + self.activations + self.overhead + self.retention

    def __str__(self) -> str:
        retention = f"retention {self.retention / GIB:.2f}, " if self.retention else ""
        return (
            f"{self.total / GIB:.2f} GiB (weights {self.weights / GIB:.2f}, gradients and Adam "
            f"{self.training / GIB:.2f}, activations {self.activations / GIB:.2f}, {retention}"
            f"libraries {self.overhead / GIB:.2f})"
        )


def estimate(prepared: PreparedModel, rows: Rows, retention: Retention | None = None) -> Memory:
    """Estimate the memory of one step with the longest batch that ``rows`` can give.

    With b bytes per number of the base, B sequences of T tokens (the longest row), A answer
    columns, V entries of the vocabulary, and n = B·(T − P) + P where all rows begin with the same P
    tokens:

    - weights: all parameters and buffers.
    - training: 12 bytes per trainable parameter, a float32 gradient and two Adam moments.
    - activations, kept for the backward pass: n·out·b per linear layer; n·h·4 per norm, which
      computes in float32 (with ``full`` n·h·(4 + b)); B·A·V·(b + 12) for the logits; with eager
      attention 2·b·n·T per head. Per adapted linear: n·r·b; S-MagNorm on weights n·in·b, and once
      (b + 8)·out·in for the largest; S-MagNorm on activations n·out·16; LoRA n·in·4 for its
      float32 copy of the input, about half where siblings share a float32 input. With ``full``:
      b·n·in per linear and a copy of W in b bytes.
    - retention: the activations of its batch, which are kept beside those of the other; its
      logits take B·A·V·(b + 20), because the bucket needs a masked copy; and the targets.
    - overhead: 1 GiB on CPUs, as measured; on GPUs only tensors are counted.

    A rule of thumb, not a promise: allocators, other architectures and kernels differ.
    """
    model, config = prepared.model, prepared.config
    full = prepared.method.trains_all_weights
    inner = model if full else model.get_base_model()
    b = 2 if full and config.dtype == "bfloat16" else inner.dtype.itemsize
    tensors = [*model.parameters(), *model.buffers()]
    weights = sum(t.numel() * t.element_size() for t in tensors)
    trained = prepared.trainable_parameters
    saved, largest = _activations(prepared, rows, config.per_device_train_batch_size, b + 12)
    kept = 0
    if retention:
        kept, _ = _activations(prepared, retention.rows, retention.batch_size, b + 20)
        kept += retention.targets.nbytes
    overhead = 0 if torch.cuda.is_available() else _CPU_OVERHEAD
    return Memory(weights, 12 * trained, saved + largest, overhead, kept)


def _activations(
    prepared: PreparedModel, rows: Rows, batch_size: int, per_logit: int
) -> tuple[int, int]:
    """Return the bytes kept for one backward pass, and those of the largest weight at work."""
    config, full = prepared.config, prepared.method.trains_all_weights
    inner = prepared.model if full else prepared.model.get_base_model()
    b = 2 if full and config.dtype == "bfloat16" else inner.dtype.itemsize
    longest = max(len(row["input_ids"]) for row in rows)
    answer = max(sum(v != IGNORE for v in row["labels"]) for row in rows)
    # What all rows begin with is computed once.
    alike = shared_length(rows, batch_size) if can_share(causal_lm(prepared.model)) else 0
    n, rank = batch_size * (longest - alike) + alike, config.rank
    saved = largest = 0
    for module in inner.modules():
        if isinstance(module, (nn.Linear, Conv1D)) and module is not inner.get_output_embeddings():
            outside = module.weight.shape[1 if isinstance(module, Conv1D) else 0]
            inside = module.weight.numel() // outside
            saved += b * n * outside
            saved += (b * n * inside + b * inside * outside) if full else 0
        elif type(module).__name__.endswith("Norm") and getattr(module, "weight", None) is not None:
            saved += n * module.weight.numel() * (4 + (b if full else 0))
        elif hasattr(module, "base_layer"):
            outside, inside = module.out_features, module.in_features
            if not prepared.method.is_cur:
                saved += 4 * n * (inside if b < 4 else inside // 2)
            elif config.magnorm in REPRODUCTION_ONLY:
                saved += 16 * n * outside
            elif config.magnorm == "none":
                saved += n * rank * b
            else:
                saved += n * inside * b
                largest = max(largest, (b + 8) * outside * inside)
    if inner.config._attn_implementation == "eager":
        heads = inner.config.num_attention_heads * inner.config.num_hidden_layers
        saved += 2 * b * n * longest * heads
    saved += batch_size * answer * inner.config.vocab_size * per_logit
    return saved, largest


def resident() -> int:
    """Return the bytes that this process holds now, on its GPU or in main memory."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    return int(psutil.Process().memory_info().rss)


def peak() -> int:
    """Return the largest :func:`resident` since the process began."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def available() -> int:
    """Return the bytes that are still free, on the GPU or in main memory."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    return available_memory()
