"""secura-merge against PEFT's merge_and_unload + save_pretrained, cp -r + sync, and mergekit."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import _peers
from benchmarks._report import header, out_file, versions
from benchmarks._synthetic import make_adapter, make_base, size

ROOT = Path(__file__).resolve().parents[1]

LIBRARIES = ("torch", "transformers", "peft", "safetensors")
TARGETS = {"q,v": ("q_proj", "v_proj"), "all linears": ()}


def measure(tool: str, python: str, base: Path, adapter: Path, out: Path) -> dict[str, float]:
    """One run in a fresh process: seconds with and without imports, peak resident MiB."""
    os.sync()
    command = [python, "-P", _peers.__file__, tool]
    start = time.perf_counter()
    done = subprocess.run(
        [*command, str(base), str(adapter), str(out)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    wall = time.perf_counter() - start
    assert done.returncode == 0, f"{tool} failed:\n{done.stderr[-2000:]}"
    written = size(out)
    shutil.rmtree(out)
    seconds, peak = map(float, done.stdout.split()[-2:])
    return {
        "seconds": round(seconds, 3),
        "wall_with_imports_s": round(wall, 3),
        "mib_per_s": round(written / seconds / 2**20, 1),
        "peak_rss_mib": round(peak, 1),
    }


def case(
    work: Path, base: Path, targets: str, mode: str, rank: int, repeat: int, mergekit: str | None
) -> dict[str, Any]:
    """All contenders in turn, ``repeat`` times; the median run of each."""
    from secura_serve.merge import export_lora, open_source

    adapter = make_adapter(base, work / "adapter", TARGETS[targets], mode, rank)
    theirs = adapter
    if mode == "none":  # stock PEFT then, with the same update as a LoRA
        theirs = work / "lora"
        export_lora(open_source(str(base), [str(adapter)]), theirs)
    tools = {
        "secura-merge": (sys.executable, adapter),
        "peft": (sys.executable, theirs),
        "cp -r + sync": (sys.executable, adapter),
    }
    if mergekit and mode == "none":  # it knows LoRA only
        tools["mergekit"] = (mergekit, theirs)
    runs: dict[str, list[dict[str, float]]] = {tool: [] for tool in tools}
    for _ in range(repeat):
        for tool, (python, given) in tools.items():
            runs[tool].append(measure(tool, python, base, given, work / "out"))
            print(f"  {tool:14} {runs[tool][-1]}", flush=True)
    shutil.rmtree(adapter)
    shutil.rmtree(work / "lora", ignore_errors=True)
    middle = {
        tool: sorted(taken, key=lambda r: r["seconds"])[len(taken) // 2]
        for tool, taken in runs.items()
    }
    ours, peft, cp = (middle[tool] for tool in ("secura-merge", "peft", "cp -r + sync"))
    row = {
        "targets": targets,
        "mode": mode,
        "rank": rank,
        "median": middle,
        "seconds_of_all": {k: [r["seconds"] for r in v] for k, v in runs.items()},
        "times_peft_speed": round(peft["seconds"] / ours["seconds"], 2),
        "share_of_peft_memory": round(ours["peak_rss_mib"] / peft["peak_rss_mib"], 3),
        "share_of_cp_speed": round(cp["seconds"] / ours["seconds"], 3),
    }
    if other := middle.get("mergekit"):
        row["times_mergekit_speed"] = round(other["seconds"] / ours["seconds"], 2)
        row["share_of_mergekit_memory"] = round(ours["peak_rss_mib"] / other["peak_rss_mib"], 3)
    return row


def measure_all(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    mergekit = args.mergekit
    if mergekit == "auto":
        mergekit = str(_peers.install_mergekit(work / "mergekit"))
    report: dict[str, Any] = {
        "command": "python -m benchmarks.merge "
        f"--gib {args.gib:g} --rank {args.rank} --repeat {args.repeat}"
        + (f" --mergekit {'auto' if args.mergekit == 'auto' else 'PYTHON'}" if mergekit else ""),
        **header(LIBRARIES),
        "base": "in the page cache",
        "cases": [],
    }
    if mergekit:
        report["versions_of_mergekit"] = versions(mergekit, ("mergekit", *LIBRARIES))
    print(json.dumps(report, indent=1), flush=True)
    base = make_base(work / "base", args.gib)
    report["base_mib"] = round(size(base) / 2**20, 1)
    for targets, mode in (("q,v", "none"), ("all linears", "none"), ("all linears", "bounded")):
        print(f"{targets}, S-MagNorm {mode}", flush=True)
        row = case(work, base, targets, mode, args.rank, args.repeat, mergekit)
        report["cases"].append(row)
    shutil.rmtree(base)
    report["peak_rss_mib_by_size"] = peaks = {}
    for times in (1, 2):
        base = make_base(work / "base", times * args.gib)
        adapter = make_adapter(base, work / "adapter", (), "bounded", args.rank)
        runs = [
            measure("secura-merge", sys.executable, base, adapter, work / "out") for _ in range(2)
        ]
        peaks[f"{size(base) / 2**20:.0f} MiB"] = statistics.mean(r["peak_rss_mib"] for r in runs)
        shutil.rmtree(base)
        shutil.rmtree(adapter)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gib", type=float, default=2.0, help="size of the base (default: 2)")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--work", type=Path, help="folder on the disk to measure")
    parser.add_argument("--out", type=out_file, default=ROOT / "benchmarks/results/merge.json")
    parser.add_argument(
        "--mergekit",
        metavar="PYTHON",
        help="a Python that has mergekit, to measure it too; `auto` makes a temporary venv",
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.work) as name:
        report = measure_all(args, Path(name))
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
