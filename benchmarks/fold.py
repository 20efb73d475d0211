"""Folding into a running engine against a plain reload of the same weights through the same path.

    python -m benchmarks.fold [--base smollm2-135m] [--repeat 5] [--out results/fold.json]

One vLLM engine (eager, the base's dtype). ``reload`` reads W from the page cache and writes it in
place through vLLM's reload: what unfolding does. ``fold`` does the same with the fold between.
Both are the time for which the engine answers nobody. ``verify_base``, which compares fingerprints,
comes before a fold, in the server's process and while the engine still answers. Here the engine is
idle: waiting for requests is not part of any. On a CPU; what a fold takes on a GPU is measured by
``benchmarks.gpu``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks._report import out_file, report_head
from benchmarks._synthetic import make_adapter

EXTENSION = "secura_serve.serve.engine.worker_extension.WorkerExtension"


def make_adapters(base: Path, folder: Path) -> dict[str, Path]:
    """Random adapters of rank 32: q and v or all linears, `none` and `bounded`."""
    return {
        f"{targets}, {mode}": make_adapter(base, folder / f"a{i}-{mode}", leaves, mode, 32)
        for i, (targets, leaves) in enumerate((("q,v", ("q_proj", "v_proj")), ("all linears", ())))
        for mode in ("none", "bounded")
    }


def measure(base: Path, adapters: dict[str, Path], repeat: int) -> list[dict[str, Any]]:
    """One row per adapter: seconds of a fold and of the reload that takes it back."""
    from vllm import LLM

    from secura_serve.merge import verify_base

    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    llm = LLM(
        model=str(base), enforce_eager=True, max_model_len=256, worker_extension_cls=EXTENSION
    )

    def swap(spec: str | None, proof: str | None = None) -> dict[str, Any]:
        done = llm.collective_rpc("secura_fold", args=(spec, cores, proof))
        return max(done, key=lambda rank: rank["seconds"])

    rows = []
    for name, path in adapters.items():
        look, fold, reload = [], [], []
        for _ in range(repeat + 1):
            begin = time.perf_counter()
            proof = verify_base(str(base), [str(path)])
            look.append(time.perf_counter() - begin)
            done = swap(str(path), proof)
            fold.append(done["seconds"])
            back = swap(None)
            reload.append(back["seconds"])
        # The first round touches memory that the others find warm.
        prove_s, fold_s, reload_s = (statistics.median(t[1:]) for t in (look, fold, reload))
        rows.append(
            {
                "adapter": name,
                "linears": done["modules"],
                "mib": round(back["bytes"] / 2**20, 1),
                "prove_s": round(prove_s, 3),
                "fold_s": round(fold_s, 3),
                "reload_s": round(reload_s, 3),
                "fold_over_reload": round(fold_s / reload_s, 2),
                "prove_and_fold_over_reload": round((prove_s + fold_s) / reload_s, 2),
                "all_prove_s": [round(s, 3) for s in look],
                "all_fold_s": [round(s, 3) for s in fold],
                "all_reload_s": [round(s, 3) for s in reload],
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    # Left to the interpreter's exit it would come too late: the folder of the adapters has a
    # finalizer from before vLLM imported multiprocessing, so all finalizers run after
    # multiprocessing has begun to wait for the engine.
    llm.llm_engine.engine_core.shutdown()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", default="smollm2-135m", help="alias or folder (%(default)s)")
    parser.add_argument("--repeat", type=int, default=5, help="folds of each (%(default)s)")
    parser.add_argument("--out", type=out_file, help="JSON to write (none by default)")
    given = parser.parse_args()
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    from secura_serve.bases import resolve_base

    base = resolve_base(given.base).path
    report = {
        **report_head("benchmarks.fold", ("torch", "transformers")),
        "base": given.base,
    }
    with tempfile.TemporaryDirectory() as folder:
        report["rows"] = measure(base, make_adapters(base, Path(folder)), given.repeat)
    if given.out:
        given.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
