"""One training step: CUR adapters against PEFT's LoRA on the same targets, in time and in memory.

    python -m benchmarks.train_step [--base smollm2-135m] [--targets q,v] [--out results/x.json]

A step is forward, loss on every token, backward and AdamW, on 8 sequences of 128 tokens. Times:
all contenders live in one process and take turns, in another order each round; each ratio to LoRA
is that of its own round. `cpu_s` is processor time, less touched by other work on the machine;
compare it with --threads 1 only. Memory: each contender alone in a fresh process, its peak over 3
steps (resident set on a CPU, max_memory_allocated on CUDA). `equal rank` gives every contender 16,
`equal parameters` the rank whose number of trained parameters comes nearest to LoRA's with rank 4.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks._report import out_file, report_head

TARGETS: dict[str, Any] = {"q,v": ["q_proj", "v_proj"], "all-linear": "all-linear"}
KINDS = ("lora", "u", "ab", "u bounded", "ab bounded")
MATCHES = ("equal rank", "equal parameters")
SYNTHETIC = "llama-2048x4"


def load(base: str, dtype: str, device: str) -> Any:
    """The frozen base: a checkpoint, or 4 random layers of Llama-3.2-1B's shape."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    torch_dtype = getattr(torch, dtype)
    if base != SYNTHETIC:
        from secura_serve.bases import resolve_base

        return AutoModelForCausalLM.from_pretrained(resolve_base(base).path, dtype=torch_dtype).to(
            device
        )
    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_attention_heads=32,
        num_key_value_heads=8,
        num_hidden_layers=4,
        vocab_size=8192,
        tie_word_embeddings=True,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch_dtype).to(device)


def adapt(model: Any, kind: str, targets: str, match: str) -> Any:
    """Return ``model`` with adapters of ``kind`` of the rank that ``match`` asks for."""
    from peft import LoraConfig, get_peft_model

    from secura_serve.train import SecuraConfig

    names = TARGETS[targets]
    rank = 16 if match == "equal rank" else 4
    if kind == "lora":
        return get_peft_model(model, LoraConfig(r=rank, lora_alpha=rank, target_modules=names))
    core, _, norm = kind.partition(" ")
    if match == "equal parameters":
        leaves = () if targets == "all-linear" else tuple(names)
        sizes = [
            sum(m.weight.shape)
            for n, m in model.named_modules()
            if n.endswith(leaves or "_proj") and hasattr(m, "weight")
        ]
        each = rank * sum(sizes) / len(sizes)
        rank = round((each if core == "u" else each / 2) ** 0.5)
    settings = {"r": rank, "core": core, "magnorm": {"mode": norm} if norm else None}
    return get_peft_model(model, SecuraConfig(target_modules=names, **settings))


def stepper(model: Any, device: str) -> Callable[[], tuple[float, float]]:
    """A function that takes one step and returns its seconds, on the wall and of the CPU."""
    import torch

    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    size = (8, 128)
    ids = torch.randint(0, model.config.vocab_size, size, generator=generator).to(device)
    model.train()

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    def step() -> tuple[float, float]:
        wait()
        start, busy = time.perf_counter(), time.process_time()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        wait()
        return time.perf_counter() - start, time.process_time() - busy

    return step


def times(given: argparse.Namespace, match: str) -> dict[str, dict[str, Any]]:
    """Seconds of a step and their ratio to LoRA's, contenders taking turns."""
    models = {}
    for kind in given.kinds:
        base = load(given.base, given.dtype, given.device)
        models[kind] = adapt(base, kind, given.targets, match)
    steps = {kind: stepper(model, given.device) for kind, model in models.items()}
    taken: dict[str, list[tuple[float, float]]] = {kind: [] for kind in steps}
    for turn in range(given.warmup + given.rounds):
        shift = turn % len(steps)
        order = [*steps][shift:] + [*steps][:shift]
        for kind in order if turn % 2 else reversed(order):
            pair = steps[kind]()
            if turn >= given.warmup:
                taken[kind].append(pair)
    rows = {}
    for kind, model in models.items():
        row = {
            "rank": model.peft_config["default"].r,
            "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        }
        for i, name in enumerate(("step_s", "cpu_s")):
            mine, lora = ([pair[i] for pair in taken[k]] for k in (kind, "lora"))
            ratios = [a / b for a, b in zip(mine, lora, strict=True)]
            row |= {
                name: round(statistics.median(mine), 4),
                f"{name}_over_lora": round(statistics.median(ratios), 3),
                f"{name}_over_lora_quartiles": [
                    round(q, 3) for q in statistics.quantiles(ratios, n=4)[::2]
                ],
                f"all_{name}": [round(s, 4) for s in mine],
            }
        rows[kind] = row
    return rows


def memory(given: argparse.Namespace, kind: str, match: str) -> float:
    """Peak MiB of this process over 3 steps of one contender."""
    import torch

    step = stepper(
        adapt(load(given.base, given.dtype, given.device), kind, given.targets, match),
        given.device,
    )
    for _ in range(3):
        step()
    if given.device == "cuda":
        return float(torch.cuda.max_memory_allocated() / 2**20)
    status = Path("/proc/self/status").read_text()
    return next(int(v.split()[1]) for v in status.splitlines() if v.startswith("VmHWM")) / 2**10


def measure(given: argparse.Namespace, match: str) -> dict[str, dict[str, Any]]:
    rows = times(given, match)
    for kind, row in rows.items():
        command = [sys.executable, "-m", "benchmarks.train_step", *sys.argv[1:], "--peak"]
        command += [given.base, given.targets, kind, match]
        peaks = []
        for _ in range(given.processes):
            said = subprocess.run(command, capture_output=True, text=True, check=True)
            peaks.append(float(said.stdout.split()[-1]))
        row["peak_mib"] = round(statistics.median(peaks), 1)
        row["all_peak_mib"] = [round(p, 1) for p in peaks]
        row["peak_over_lora"] = round(row["peak_mib"] / rows["lora"]["peak_mib"], 3)
        shown = {key: value for key, value in row.items() if not key.startswith("all_")}
        print(f"  {match:16} {kind:10} {json.dumps(shown)}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", nargs="+", default=["smollm2-135m", SYNTHETIC])
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--match", nargs="+", default=list(MATCHES), choices=MATCHES)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--dtype", default="bfloat16", help="of the base (%(default)s)")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--processes", type=int, default=3, help="per peak of memory")
    parser.add_argument("--threads", type=int, help="of torch; its own choice by default")
    parser.add_argument("--out", type=out_file, help="JSON to write")
    parser.add_argument("--peak", nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args()

    import torch

    if given.threads:
        torch.set_num_threads(given.threads)
    given.device = "cuda" if torch.cuda.is_available() else "cpu"
    if given.peak:
        given.base, given.targets, kind, match = given.peak
        print(memory(given, kind, match))
        return
    report = {
        **report_head("benchmarks.train_step", ("torch", "transformers", "peft")),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if given.device == "cuda" else "cpu",
        "dtype": given.dtype,
        "tokens": 1024,
        "rows": [],
    }
    print(json.dumps({key: report[key] for key in ("commit", "machine", "versions")}))
    bases, targets = given.base, given.targets
    for base in bases:
        for names in targets:
            for match in given.match:
                given.base, given.targets = base, names
                print(f"{base}, {names}", flush=True)
                rows = measure(given, match)
                for kind, row in rows.items():
                    head = {"base": base, "targets": names, "match": match, "adapter": kind}
                    report["rows"].append(head | row)
                if given.out:
                    given.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
