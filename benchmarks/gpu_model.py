"""A model, not a measurement: what the adapter step adds to a decode step of Llama-3-8B on a GPU.

    python -m benchmarks.gpu_model [--ranks 16 32 64] [--out results/gpu_model.json]

The launches are those that the code makes (caught, not run); what each of them reads and writes
follows from its arguments. Time of a launch = a fixed cost + bytes from memory / bandwidth + bytes
from the cache / its bandwidth. Of the launch that takes the place of the base's activation only C
and h count: the base has that launch, and reads and writes the rest, too. Two launches beside the
base linear cost what both take longer together than the linear alone: memory and cache carry the
bytes of both. To wait for them costs, too. Every constant is in the report. No GPU is needed; the
package ``triton`` is.
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
    # What a kernel that waits for two streams costs more than one that waits for one: no figure
    # was found, so a guess.
    "join_s": (0.0, 0.5e-6),
    # How long the linear's programs may wait for places that those of the launch beside it hold,
    # which is there first: a guess, too. It is short, and small enough to share a multiprocessor
    # with many a GEMM, but not with one that takes all registers.
    "linear_held_up_s": (0.0, 1.0e-6),
    "multiprocessors": 132,
}
_GUESSES = ("join_s", "linear_held_up_s")
_BESIDE = ("rows_product", "core_of_parts")
# A gathered number costs the 32 bytes around it.
_SECTOR = 32


def traffic(launch: Launch, adapters: int) -> tuple[float, float]:
    """Return the bytes that a launch moves from memory and from the cache.

    What no step before it can have left in the cache, C and U, comes from memory once.
    """
    given, name = launch.given, launch.kernel.__name__
    if name == "rows_product":
        tokens, width = given["x"].shape
        # Each tile of tokens reads the rows, each block of rows reads x; then sums of 4 bytes.
        rows = given["count"] * width * BYTES
        read = rows * (launch.grid[2] - 1) + tokens * width * BYTES * launch.grid[0]
        return rows, read + 4 * tokens * given["count"] * launch.grid[1]
    n, r = given.get("n", 2), given["r"]
    if name == "core_of_parts":
        tokens, blocks = len(given["slots"]), launch.grid[1] // n
        U, again = _mixing(n, r, tokens, adapters, reads=tokens, programs=0)
        return U, again + tokens * n * r * (4 * given["PARTS"] * blocks + BYTES)
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


def linear_seconds(
    width: int, outs: tuple[int, ...], tokens: int, beside: tuple[float, float] = (0, 0)
) -> float:
    """Return the time of a base linear: its weights are read once, or the product takes longer.

    Args:
        beside: bytes that are moved from memory and from the cache at the same time.
    """
    weights: int = width * sum(outs)
    H: Any = H100
    from_memory = weights * BYTES + beside[0]
    through_cache = weights * BYTES + sum(beside)
    return max(
        from_memory / H["memory_bytes_per_s"],
        through_cache / H["cache_bytes_per_s"],
        2 * weights * tokens / H["flops_per_s"],
    )


def overhead(
    r: int, tokens: int, adapters: int, early: bool = True, beside: bool = True
) -> dict[str, Any]:
    """Return what one decode step has, and its share of the base's time, low and high.

    Args:
        early: whether a kernel may start before the one ahead has ended.
        beside: whether the first half of the step runs beside the linear.
    """
    constants: Any = H100
    memory, cache = constants["memory_bytes_per_s"], constants["cache_bytes_per_s"]
    times, guessed, moved, after, total = [0.0, 0.0], [0.0, 0.0], [0.0, 0.0], 0, 0
    for name, (width, outs) in LLAMA3_8B.items():
        launches = step_launches(
            outs, r, tokens, early=early, adapters=adapters, activation=ACTIVATIONS.get(name),
            width=width if beside else None,
        )  # fmt: skip
        at_once, chain = (0.0, 0.0), [0.0, 0.0]
        for i, launch in enumerate(launches):
            first, again = traffic(launch, adapters)
            costs, moving = fixed(launch, early and i > 0 and not beside), first / memory
            moving += again / cache
            hidden = launch.kernel.__name__ in _BESIDE
            # Few programs do not have the whole of the bandwidth.
            share = min(launch.programs / constants["multiprocessors"], 1)
            if hidden:
                at_once = (at_once[0] + first, at_once[1] + again)
            for bound in (0, 1):
                chain[bound] += (constants["launch_s"][bound] + moving / share) * hidden
                times[bound] += 0 if hidden else LAYERS * (costs[bound] + moving)
            moved[0] += LAYERS * first
            moved[1] += LAYERS * again
            total += LAYERS * (launch.kernel.__name__ != "expand_activated")
            after += LAYERS * (not hidden and launch.kernel.__name__ != "expand_activated")
        alone = linear_seconds(width, outs, tokens)
        together = linear_seconds(width, outs, tokens, at_once)
        for bound in (0, 1) if beside else ():
            longer = max(together, chain[bound]) - alone
            guessed[bound] += LAYERS * sum(constants[name][bound] for name in _GUESSES)
            times[bound] += LAYERS * longer
    base = base_seconds(tokens)
    return {
        "rank": r,
        "tokens": tokens,
        "adapters": adapters,
        "beside": beside,
        "launches": total,
        "launches_after": after,
        "from_memory_mb": round(moved[0] / 1e6, 1),
        "from_cache_mb": round(moved[1] / 1e6, 1),
        "base_ms": round(base * 1e3, 2),
        "of_launches_and_bytes": [round(time / base, 3) for time in times],
        "overhead": [round(sum(both) / base, 3) for both in zip(times, guessed, strict=True)],
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
        overhead(r, tokens, adapters, beside=beside)
        for beside in (True, False)
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
