"""secura-merge against PEFT's merge_and_unload + save_pretrained and against cp -r + sync."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
HIDDEN, WIDE, KV, VOCAB = 2048, 8192, 512, 32000  # Llama-3.2-1B's layers
PROJECTIONS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KV, HIDDEN),
    "self_attn.v_proj": (KV, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (WIDE, HIDDEN),
    "mlp.up_proj": (WIDE, HIDDEN),
    "mlp.down_proj": (HIDDEN, WIDE),
}
TARGETS = {"q,v": ("q_proj", "v_proj"), "all linears": ()}


def make_base(folder: Path, gib: float) -> Path:
    """A random bfloat16 Llama of about ``gib`` GiB in shards of about 0.5 GiB."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    layer = 2 * sum(out * into for out, into in PROJECTIONS.values())
    layers = max(1, round((gib * 2**30 - 2 * VOCAB * HIDDEN) / layer))
    folder.mkdir(parents=True)
    LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=WIDE,
        num_attention_heads=HIDDEN // 64,
        num_key_value_heads=KV // 64,
        num_hidden_layers=layers,
        vocab_size=VOCAB,
        tie_word_embeddings=True,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(WIDE * HIDDEN, generator=generator).mul_(0.02).bfloat16()

    def matrix(out: int, into: int) -> torch.Tensor:
        # Shifted views of one sheet of noise: no two layers alike, and made in no time.
        shift = int(torch.randint(noise.numel(), (), generator=generator))
        return noise.roll(shift)[: out * into].view(out, into).clone()

    weight_map: dict[str, str] = {}
    groups = [list(range(i, min(i + 4, layers))) for i in range(0, layers, 4)]
    for i, group in enumerate(groups):
        tensors = {}
        if i == 0:
            embed = torch.randn(VOCAB, HIDDEN, generator=generator).mul_(0.02)
            tensors["model.embed_tokens.weight"] = embed.bfloat16()
            tensors["model.norm.weight"] = torch.ones(HIDDEN, dtype=torch.bfloat16)
        for n in group:
            for name, shape in PROJECTIONS.items():
                tensors[f"model.layers.{n}.{name}.weight"] = matrix(*shape)
            for name in ("input_layernorm", "post_attention_layernorm"):
                tensors[f"model.layers.{n}.{name}.weight"] = torch.ones(HIDDEN).bfloat16()
        file = f"model-{i + 1:05}-of-{len(groups):05}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    index = {"metadata": {"total_size": size(folder)}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def make_adapter(base: Path, target: Path, only: tuple[str, ...], mode: str, rank: int) -> Path:
    """A random adapter: its numbers do not matter for speed."""
    import torch

    from secura_serve import adapter as A
    from secura_serve.checkpoint import Checkpoint
    from secura_serve.method import MagNorm, auto_alpha, select

    checkpoint = Checkpoint(base)
    generator = torch.Generator().manual_seed(1)
    modules, prints = {}, {}
    for name in checkpoint.linears():
        if only and not name.endswith(only):
            continue
        W = checkpoint.weight(name)
        basis = select(W, rank, module=name)
        U = torch.randn(rank, rank, generator=generator) * 0.05 * auto_alpha(W, basis)
        modules[name] = A.CURModule(U, basis.rows.int(), basis.cols.int())
        prints[name] = A.fingerprint(W, basis)
    config = A.AdapterConfig(
        base_model_name_or_path=base.name,
        r=rank,
        target_modules=tuple(sorted({name.rpartition(".")[2] for name in modules})),
        base_fingerprint=prints,
        magnorm=MagNorm(mode),
    )
    return A.save(target, config, modules)


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


# ---- what runs in a process of its own: prints the seconds without imports ----------------------


def run_ours(base: Path, adapter: Path, out: Path) -> float:
    from secura_serve.merge import plan_merge, write_merge

    start = time.perf_counter()
    write_merge(plan_merge(str(base), [str(adapter)], out))
    return time.perf_counter() - start


def run_peft(base: Path, adapter: Path, out: Path) -> float:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    # Our tuner for adapters with a norm; a LoRA folder is loaded by stock PEFT alone.
    from secura_serve.train import SecuraModel  # noqa: F401

    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    model.save_pretrained(out, max_shard_size="500MB")
    os.sync()
    return time.perf_counter() - start


def run_cp(base: Path, adapter: Path, out: Path) -> float:
    start = time.perf_counter()
    subprocess.run(["cp", "-r", str(base), str(out)], check=True)
    os.sync()
    return time.perf_counter() - start


RUNS = {"secura-merge": run_ours, "peft": run_peft, "cp -r + sync": run_cp}


def measure(kind: str, base: Path, adapter: Path, out: Path) -> dict[str, float]:
    """One run in a fresh process: seconds with and without imports, peak resident MiB."""
    os.sync()
    command = [sys.executable, "-P", str(Path(__file__)), "--child", kind]
    start = time.perf_counter()
    child = subprocess.Popen(
        [*command, str(base), str(adapter), str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert child.stdout is not None
    said = child.stdout.read()
    status = child.wait()
    wall = time.perf_counter() - start
    assert status == 0, f"{kind} failed"
    written = size(out)
    shutil.rmtree(out)
    seconds, peak = map(float, said.split()[-2:])
    return {
        "seconds": round(seconds, 3),
        "wall_with_imports_s": round(wall, 3),
        "mib_per_s": round(written / seconds / 2**20, 1),
        "peak_rss_mib": round(peak, 1),
    }


def machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    models = [line.split(":")[1].strip() for line in info.splitlines() if "model name" in line]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(memory, 1),
        "load_before": [round(x, 2) for x in os.getloadavg()],
    }


def commit() -> str:
    git = ["git", "-C", str(ROOT)]
    found = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
    dirty = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True)
    return found.stdout.strip() + ("+changes" if dirty.stdout.strip() else "")


def case(work: Path, base: Path, targets: str, mode: str, rank: int, repeat: int) -> dict[str, Any]:
    """All contenders in turn, ``repeat`` times; the median run of each."""
    from secura_serve.merge import export_lora, open_source

    adapter = make_adapter(base, work / "adapter", TARGETS[targets], mode, rank)
    theirs = adapter
    if mode == "none":  # stock PEFT then, with the same update as a LoRA
        theirs = work / "lora"
        export_lora(open_source(str(base), [str(adapter)]), theirs)
    runs: dict[str, list[dict[str, float]]] = {kind: [] for kind in RUNS}
    for _ in range(repeat):
        for kind in RUNS:
            given = theirs if kind == "peft" else adapter
            runs[kind].append(measure(kind, base, given, work / "out"))
            print(f"  {kind:14} {runs[kind][-1]}", flush=True)
    shutil.rmtree(adapter)
    shutil.rmtree(work / "lora", ignore_errors=True)
    middle = {
        kind: sorted(found, key=lambda r: r["seconds"])[len(found) // 2]
        for kind, found in runs.items()
    }
    ours, peft, cp = (middle[kind] for kind in RUNS)
    return {
        "targets": targets,
        "mode": mode,
        "rank": rank,
        "median": middle,
        "seconds_of_all": {k: [r["seconds"] for r in v] for k, v in runs.items()},
        "times_peft_speed": round(peft["seconds"] / ours["seconds"], 2),
        "share_of_peft_memory": round(ours["peak_rss_mib"] / peft["peak_rss_mib"], 3),
        "share_of_cp_speed": round(cp["seconds"] / ours["seconds"], 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gib", type=float, default=2.0, help="size of the base (default: 2)")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--work", type=Path, help="folder on the disk to measure")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/merge.json")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        kind, *paths = args.child
        seconds = RUNS[kind](*map(Path, paths))
        # Not getrusage: what that calls the peak includes the parent's, from before the exec.
        status = Path("/proc/self/status").read_text()
        peak = next(int(v.split()[1]) for v in status.splitlines() if v.startswith("VmHWM"))
        print(seconds, peak / 2**10)
        return
    report: dict[str, Any] = {
        "command": "python benchmarks/merge.py "
        f"--gib {args.gib:g} --rank {args.rank} --repeat {args.repeat}",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine(),
        "versions": {n: version(n) for n in ("torch", "transformers", "peft", "safetensors")},
        "base": "in the page cache",
        "cases": [],
    }
    print(json.dumps(report, indent=1), flush=True)
    with tempfile.TemporaryDirectory(dir=args.work) as name:
        work = Path(name)
        base = make_base(work / "base", args.gib)
        report["base_mib"] = round(size(base) / 2**20, 1)
        for targets, mode in (("q,v", "none"), ("all linears", "none"), ("all linears", "bounded")):
            print(f"{targets}, S-MagNorm {mode}", flush=True)
            report["cases"].append(case(work, base, targets, mode, args.rank, args.repeat))
        shutil.rmtree(base)
        peaks = {}
        for times in (1, 2):
            base = make_base(work / "base", times * args.gib)
            adapter = make_adapter(base, work / "adapter", (), "bounded", args.rank)
            found = [measure("secura-merge", base, adapter, work / "out") for _ in range(2)]
            peaks[f"{size(base) / 2**20:.0f} MiB"] = statistics.mean(
                r["peak_rss_mib"] for r in found
            )
            shutil.rmtree(base)
            shutil.rmtree(adapter)
        report["peak_rss_mib_by_size"] = peaks
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
