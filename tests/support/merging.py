"""Bases and adapters to merge, a float64 oracle that shares no code with the package, and a way
to stop a merge at each step that it takes. As a script: kill one merge after the other, see
:func:`killed_at_every_step`.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from secura_serve import adapter as A
from secura_serve.checkpoint import Checkpoint
from secura_serve.method import MagNorm, delta
from secura_serve.method.magnorm import rho_max
from tests.support import ROOT
from tests.support.engines import random_adapter

# The calls that change the disk.
STEPS = ("pwrite", "copy_file_range", "fsync", "rename", "mkdir")
NORMS = (MagNorm(), MagNorm("bounded", tau=0.05), MagNorm("published"))


def make_adapter(
    base: Path,
    target: Path,
    *,
    norm: MagNorm | None = None,
    r: int = 4,
    seed: int = 0,
    only: tuple[str, ...] = (),
    rule: str = "inverse_sampled",
) -> Path:
    """A random adapter under any S-MagNorm setting."""
    plain = A.load(random_adapter(base, target, r=r, seed=seed, only=only, rule=rule))
    modules = dict(plain.modules)
    norm = norm or MagNorm()
    if norm.needs_rho_max:
        checkpoint = Checkpoint(base)
        for name, cur in modules.items():
            W = checkpoint.weight(name).float()
            peak = float(rho_max(W, delta(W, cur.basis, cur.U), norm.eps))
            modules[name] = replace(cur, rho_max=peak)
    # PEFT knows the shorthand "all-linear" as a word only, not in a list.
    names = tuple(sorted({name.rpartition(".")[2] for name in modules}))
    config = replace(plain.config, magnorm=norm, target_modules=names)
    return A.save(target, config, modules, overwrite=True)


def reshard(base: Path, target: Path, shards: int, dtype: torch.dtype | None = None) -> Path:
    """The same checkpoint in ``shards`` files, plain floats in ``dtype``."""
    shutil.copytree(base, target)
    tensors = load_file(target / "model.safetensors")
    (target / "model.safetensors").unlink()
    names, weight_map = sorted(tensors), {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = {n: tensors[n].to(dtype or tensors[n].dtype) for n in names[i::shards]}
        save_file(part, target / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (target / "model.safetensors.index.json").write_text(json.dumps(index))
    if dtype is not None:
        config = json.loads((target / "config.json").read_text())
        config["dtype"] = str(dtype).removeprefix("torch.")
        (target / "config.json").write_text(json.dumps(config))
    return target


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, by their names in the files."""
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def oracle(
    base: Path, adapters: list[tuple[Path, float]], norm: MagNorm
) -> dict[str, torch.Tensor]:
    """The merged tensors in float64, written from method.md's table."""
    tensors = tensors_of(base)
    gpt2 = json.loads((base / "config.json").read_text())["model_type"] == "gpt2"
    updates: dict[str, torch.Tensor] = {}
    peaks: dict[str, float] = {}
    for folder, weight in adapters:
        files = load_file(folder / "adapter_model.safetensors")
        for key in (k for k in files if k.endswith("secura_U")):
            name = key.removeprefix("base_model.model.").removesuffix("secura_U") + "weight"
            name = name if name in tensors else name.removeprefix("transformer.")
            W = tensors[name].double()
            W = W.T if gpt2 else W
            rows, cols = (files[key[:-1] + axis].long() for axis in ("rows", "cols"))
            part = weight * W[:, cols] @ files[key].double() @ W[rows]
            updates[name] = updates.get(name, torch.zeros_like(W)) + part
            if key[:-1] + "rho_max" in files:
                peaks[name] = float(files[key[:-1] + "rho_max"])
    for name, D in updates.items():
        W = tensors[name].double()
        W = W.T if gpt2 else W
        if norm.mode == "none":
            new = W + D
        elif norm.mode == "bounded":
            new = W + norm.tau * W.abs() * torch.tanh(D / (norm.tau * W.abs()))
        else:
            rho = D.abs() / (W.abs() + 1e-8) / peaks[name]
            new = (2 * W + D) / (2 - 1 / (1 + torch.exp(-6 * (rho - 0.5))))
        tensors[name] = new.T if gpt2 else new
    return tensors


def at_step(step: int, act: Callable[[], None], patch: Callable[[str, Any], object]) -> list[str]:
    """Call ``act`` before each change of the disk from the ``step``-th on; they are returned."""
    done: list[str] = []

    def wrap(name: str, real: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            done.append(name)
            if len(done) > step:
                act()
            return real(*args, **kwargs)

        return call

    for name in STEPS:
        patch(name, wrap(name, getattr(os, name)))
    return done


def killed_at_every_step(folder: Path, flags: list[str]) -> list[Path]:
    """Kill -9 a merge into ``folder/<step>/out`` at each of its steps; the last one survives."""
    # Forked from a process that has torch loaded and no threads yet: a merge costs milliseconds.
    subprocess.run([sys.executable, "-m", __name__, str(folder), *flags], check=True, cwd=ROOT)
    return [made / "out" for made in sorted(folder.iterdir(), key=lambda p: int(p.name))]


def _kill_all(folder: Path, flags: list[str]) -> None:
    from secura_serve.merge import main, write  # noqa: F401 - what the children need

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    code = signal.SIGKILL
    for step in range(1000):
        (folder / str(step)).mkdir(parents=True)
        if not (child := os.fork()):
            at_step(step, die, lambda name, call: setattr(os, name, call))
            os._exit(main.main([*flags, "--out", str(folder / str(step) / "out")]))
        code = os.waitpid(child, 0)[1]
        if code != signal.SIGKILL:
            break
    sys.exit(code)


if __name__ == "__main__":
    _kill_all(Path(sys.argv[1]), sys.argv[2:])
