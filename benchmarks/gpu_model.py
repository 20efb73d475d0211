"""A model, not a measurement: what the adapter step adds to a decode step of Llama-3-8B on a GPU.

    python -m benchmarks.gpu_model [--ranks 16 32 64] [--out results/gpu_model.json]

The launches are those that the code makes (caught, not run); what each of them reads and writes
follows from its arguments. Time of a launch = a fixed cost + bytes from memory / bandwidth + bytes
from the cache / its bandwidth, with nothing overlapped. Of the launch that takes the place of the
base's activation only C and h count: the base has that launch, and reads and writes the rest, too.
Every constant is in the report. No GPU is needed; the package ``triton`` is.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks._launches import ACTIVATIONS, LLAMA3_8B, Launch, step_launches
from benchmarks._report import header, out_file

LAYERS, HEAD, BYTES = 32, 128256 * 4096, 2
H100 = {
    "memory_bytes_per_s": 3.0e12,
    "cache_bytes_per_s": 5.5e12,
    "flops_per_s": 790e12,
    # An empty kernel of a CUDA graph on an H100 (Hazy Research, "Look Ma, No Bubbles", 2025).
    "empty_launch_s": 1.3e-6,
    # Low and high: one that waits for the kernel before it, with a few loads that wait for each
    # other. The step's first kernel costs as much: it is launched as dependent, but a GEMM that
    # does not let it start has ended by then (CUDA Programming Guide, 4.5), and nothing was
    # gained where that was measured (kekzl/imp#1740: -0.9 to -0.4 % of tokens a second;
    # openxla/xla#38544: 1.00 to 1.01 times).
    "launch_s": (1.6e-6, 2.5e-6),
    # What it saves where the kernel ahead lets it start (programmatic dependent launch), for low
    # and high: 0.96 µs between two empty kernels (pegainfer-project/pegainfer#569); 0.47 µs of
    # FlashInfer's RMSNorm on an H100 (flashinfer-ai/flashinfer#960).
    "dependent_launch_saves_s": (0.96e-6, 0.47e-6),
}
# A gathered number costs the 32 bytes around it.
_SECTOR = 32


def traffic(launch: Launch, adapters: int) -> tuple[float, float]:
    """Return the bytes that a launch moves from memory and from the cache.

    What no step before it can have left in the cache, C and U, comes from memory once.
    """
    given, name = launch.given, launch.kernel.__name__
    n, r = given.get("n", 2), given["r"]
    if name in ("core", "core_grouped"):
        tokens, parts = len(given["slots"]), launch.grid[1] // n
        reads = launch.grid[0] * given.get("T", 1) / tokens * min(adapters, tokens)
        reads = tokens if name == "core" else reads
        U, again = _mixing(n, r, tokens, adapters, reads=reads, programs=parts)
        return U, again + tokens * n * r * BYTES
    tokens, out = given["y"].shape
    # C is read by each tile of tokens.
    C = r * out * BYTES
    again = (launch.grid[0] - 1) * C
    if name == "expand":
        h = tokens * r * BYTES * launch.grid[1]
        return C, again + 2 * tokens * out * BYTES + h
    # Its blocks of columns are of both slices at once, and y is the base's to read.
    if given["h"] is not None:
        return C, again + tokens * n * r * BYTES * launch.grid[1]
    blocks = launch.grid[1]
    U, mixing = _mixing(n, r, tokens, adapters, reads=tokens * blocks, programs=blocks)
    return C + U, again + mixing


def _mixing(
    n: int, r: int, tokens: int, adapters: int, *, reads: float, programs: int
) -> tuple[float, float]:
    """Return the bytes of U from memory, and those of U and g from the cache.

    Args:
        reads: how often the U of a token is read.
        programs: how many gather the same numbers.
    """
    U = n * r * r * BYTES
    distinct = min(adapters, tokens) * U
    gathered = tokens * n * r * _SECTOR * programs
    return distinct, max(reads * U - distinct, 0) + gathered


def fixed(launch: Launch, early: bool) -> tuple[float, float]:
    """Return what a launch adds besides its bytes, low and high.

    Args:
        early: whether it is the second of two and may start early.
    """
    constants: Any = H100
    low, high = constants["launch_s"]
    if launch.kernel.__name__ == "expand_activated":
        # The base's activation waits for the kernel before it, too; only chains of loads are more.
        empty = constants["empty_launch_s"]
        return (0.0, 0.0) if launch.given["h"] is not None else (low - empty, high - empty)
    saved = constants["dependent_launch_saves_s"] if early else (0.0, 0.0)
    return low - saved[0], high - saved[1]


def base_seconds(tokens: int) -> float:
    """Return the time of the base alone: all weights are read once, or the products take longer."""
    weights = LAYERS * sum(width * sum(outs) for width, outs in LLAMA3_8B.values()) + HEAD
    reading = weights * BYTES / H100["memory_bytes_per_s"]  # type: ignore[operator]
    return max(reading, 2 * weights * tokens / H100["flops_per_s"])  # type: ignore[operator]


def overhead(r: int, tokens: int, adapters: int, early: bool = True) -> dict[str, Any]:
    """Return what one decode step has, and its share of the base's time, low and high."""
    memory: Any = H100["memory_bytes_per_s"]
    cache: Any = H100["cache_bytes_per_s"]
    times, moved, count = [0.0, 0.0], [0.0, 0.0], 0
    for name, (_, outs) in LLAMA3_8B.items():
        launches = step_launches(
            outs, r, tokens, early=early, adapters=adapters, activation=ACTIVATIONS.get(name)
        )
        for i, launch in enumerate(launches):
            first, again = traffic(launch, adapters)
            costs = fixed(launch, early and i > 0)
            for bound in (0, 1):
                times[bound] += LAYERS * (costs[bound] + first / memory + again / cache)
            moved[0] += LAYERS * first
            moved[1] += LAYERS * again
            count += LAYERS * (launch.kernel.__name__ != "expand_activated")
    base = base_seconds(tokens)
    return {
        "rank": r,
        "tokens": tokens,
        "adapters": adapters,
        "launches": count,
        "from_memory_mb": round(moved[0] / 1e6, 1),
        "from_cache_mb": round(moved[1] / 1e6, 1),
        "base_ms": round(base * 1e3, 2),
        "overhead": [round(time / base, 3) for time in times],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 32, 64, 128])
    parser.add_argument(
        "--out", type=out_file, default=Path(__file__).parent / "results/gpu_model.json"
    )
    args = parser.parse_args()
    report = header(("torch", "triton")) | {"model": "Llama-3-8B, bfloat16, H100", "assumed": H100}
    report["steps"] = [
        overhead(r, tokens, adapters)
        for r in args.ranks
        for tokens, adapters in ((1, 1), (8, 8), (16, 16), (64, 64), (256, 1), (256, 256))
    ]
    idle = [
        step_launches(outs, 32, 64, active=False, activation=ACTIVATIONS.get(name))
        for name, (_, outs) in LLAMA3_8B.items()
    ]
    report["launches_without_adapters"] = sum(map(len, idle))
    for step in report["steps"]:
        print(json.dumps(step), file=sys.stderr)
    args.out.write_text(json.dumps(report, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
