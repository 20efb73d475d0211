"""The contenders of merge.py, each in a process of its own.

    python -P benchmarks/_peers.py KIND BASE ADAPTER OUT

prints the seconds of the work, imports left out, and the peak resident MiB. Only the standard
library is imported at the top: mergekit's Python has nothing of ours.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import time
import venv
from pathlib import Path

MERGEKIT = "mergekit==0.1.5"


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


def run_mergekit(base: Path, adapter: Path, out: Path) -> float:
    """What ``mergekit-yaml`` runs for ``model: base+lora``.

    mergekit lets PEFT merge the LoRA into a copy of the base on the disk, and streams that copy
    through its merge method; passthrough is the one that costs least.
    """
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    config = MergeConfiguration.model_validate(
        {
            "merge_method": "passthrough",
            "dtype": "bfloat16",
            "models": [{"model": f"{base}+{adapter}"}],
        }
    )
    copy = out.with_name("mergekit-cache")
    options = MergeOptions(
        lora_merge_cache=str(copy),
        lora_merge_dtype="bfloat16",
        out_shard_size=250_000_000,  # parameters: 500 MB, as for PEFT
        copy_tokenizer=False,  # the synthetic base has none
        quiet=True,
    )
    start = time.perf_counter()
    run_merge(config, str(out), options)
    os.sync()
    seconds = time.perf_counter() - start
    shutil.rmtree(copy)
    return seconds


def run_cp(base: Path, adapter: Path, out: Path) -> float:
    start = time.perf_counter()
    subprocess.run(["cp", "-r", str(base), str(out)], check=True)
    os.sync()
    return time.perf_counter() - start


RUNS = {
    "secura-merge": run_ours,
    "peft": run_peft,
    "mergekit": run_mergekit,
    "cp -r + sync": run_cp,
}


def install_mergekit(folder: Path) -> Path:
    """A venv with mergekit and what it lacks; the rest, torch above all, is seen from ours.

    So both run the same torch, transformers and PEFT, and nothing of ours is changed.
    """
    venv.create(folder, with_pip=True)
    python = folder / "bin/python"
    below = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    (below / "ours.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "-q", MERGEKIT]
    done = subprocess.run(pip, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(
            f"{MERGEKIT} cannot be installed here:\n{done.stderr[-2000:]}\n"
            "Name a Python that has it (--mergekit PATH), or leave --mergekit out"
        )
    return python


def main() -> None:
    tool, *paths = sys.argv[1:]
    seconds = RUNS[tool](*map(Path, paths))
    # Not getrusage: what that calls the peak includes the parent's, from before the exec.
    status = Path("/proc/self/status").read_text()
    peak = next(int(v.split()[1]) for v in status.splitlines() if v.startswith("VmHWM"))
    print(seconds, peak / 2**10)


if __name__ == "__main__":
    main()
