"""Everything that wants a GPU, in parts of bounded time, into one JSON.

    python -m benchmarks.gpu [--parts kernels step fold train serve] [--minutes 10] [--out FILE]

* ``kernels``: the Triton kernels against float64, compiled, bfloat16 too.
* ``step``: the adapter step on the linears of a layer of Llama-3-8B beside the linear itself and
  LoRA's step (vLLM's kernels where it can be imported, else the bytes and launches they need); that
  of gate and up also in the activation after them, beside the activation alone.
* ``fold``: bytes a second of a fold into one layer, whole and in place, and of the way back, beside
  a copy on the device.
* ``train``: a training step against PEFT's LoRA.
* ``serve``: base, stock LoRA and ours end to end; where vLLM can be imported.

Each part is a process of its own and is ended when its time is over; its rows until then stay. The
file keeps the parts of earlier runs that are not run again. Needs torch and triton, for ``train``
also transformers and PEFT; no network, and no vLLM but for ``serve``. ``--rehearse`` runs tiny
shapes on a CPU, in Triton's interpreter, where the numbers mean nothing; they go to a file of their
own.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks._report import ROOT, commit, end_on_terminate, machine, out_file

PARTS = ("kernels", "step", "fold", "train", "serve")
LINEARS = {
    "qkv": (4096, (4096, 1024, 1024)),
    "o": (4096, (4096,)),
    "gate_up": (4096, (14336, 14336)),
    "down": (14336, (4096,)),
}
_FOLLOWS = {"gate_up": "silu"}
CACHE_BYTES = 50 << 20
"""An H100's."""
TINY = {"qkv": (64, (64, 32, 32)), "gate_up": (64, (48, 48))}
MEASURED = ROOT / "benchmarks/results/gpu.json"
REHEARSED = ROOT / "build/gpu-rehearsal.json"
# What a part has to end in once its time is over.
_GRACE_S = 30


def kernels(rehearse: bool, add: Callable[[dict[str, Any]], None]) -> None:
    """Run the tests' cases; what fails raises."""
    from tests.support.triton_cases import ACTIVATED, FOLD, LINEAR, SHARD, STEP, STREAMS

    device = "cpu" if rehearse else "cuda"
    dtypes = ["float32"] if rehearse else ["float32", "float16", "bfloat16"]
    steps = (("step", STEP), ("activated", ACTIVATED), ("linear", LINEAR), ("streams", STREAMS))
    cases = (*steps, ("fold", FOLD), ("shard", SHARD))
    for (name, code), dtype in itertools.product(cases, dtypes):
        text = code.format(device=device, dtypes=f"(torch.{dtype},)")
        done = subprocess.run(
            [sys.executable, "-c", text], cwd=ROOT, capture_output=True, text=True
        )
        said = done.stderr.strip().splitlines()[-3:] if done.returncode else []
        add({"kernel": name, "dtype": dtype, "ok": done.returncode == 0, "said": said})


def step(rehearse: bool, add: Callable[[dict[str, Any]], None]) -> None:
    """Time the adapter step of each linear, in the order in which the figures matter."""
    import torch
    from torch.nn.functional import linear

    from benchmarks.step import lora_packed, once, packed
    from secura_serve.serve.kernels.activation import gated
    from secura_serve.serve.kernels.triton_kernel import TritonKernel

    device = torch.device("cpu" if rehearse else "cuda")
    linears = TINY if rehearse else LINEARS
    # One launch, as in vLLM's own and in a compiled model.
    alone = gated if rehearse else torch.compile(gated, dynamic=True)
    # What would run on a GPU is what is rehearsed.
    kernel = TritonKernel()
    ranks = [8] if rehearse else [32, 8, 16, 64, 128]
    batches = [(1, 1), (4, 2)] if rehearse else [
        *((1, 1), (64, 64), (256, 256), (64, 1), (256, 1), (16, 16), (512, 64), (512, 256)),
        (2048, 4),
    ]  # fmt: skip
    for r, (tokens, adapters) in itertools.product(ranks, batches):
        for name, (width, outs) in linears.items():
            x = torch.randn(tokens, width, device=device).bfloat16()
            # In a model each W comes from memory. So that none is in the cache from the call
            # before, calls go through several.
            copies = 1 if rehearse else -(-3 * CACHE_BYTES // (2 * width * sum(outs)))
            weights = [
                torch.randn(sum(outs), width, device=device).bfloat16() for _ in range(copies)
            ]
            batch, follows = (outs, r, tokens, adapters, device), _FOLLOWS.get(name)
            one = partial(packed, *batch, kernel=kernel)
            calls: dict[str, Callable[[], Any] | None] = {
                "linear_us": _in_turn([partial(linear, x, W) for W in weights]),
                "step_us": one(),
                "no_adapter_us": one(active=False),
                "linear_then_step_us": _in_turn(
                    [one(activation=follows, linear=(x, W), after=True) for W in weights]
                ),
                "linear_and_step_us": _in_turn(
                    [one(activation=follows, linear=(x, W)) for W in weights]
                ),
                "lora_us": lora_packed(width, outs, r, tokens, adapters, device),
            }
            if follows is not None:
                y = torch.randn(tokens, sum(outs), device=device).bfloat16()
                calls["activation_us"] = partial(alone, y, follows)
                calls["step_in_activation_us"] = one(activation=follows)
            row: dict[str, Any] = {"linear": name, "r": r, "tokens": tokens, "adapters": adapters}
            for what, call in calls.items():
                if call is not None and not (what == "no_adapter_us" and device.type == "cuda"):
                    times = [once(call, device) for _ in range(1 if rehearse else 5)]
                    row[what] = round(statistics.median(times), 2)
            if calls["lora_us"] is None:
                # What it cannot do without: A and B of each adapter, y read and written, twice.
                distinct = min(tokens, adapters)
                row["lora_needs"] = {
                    "launches": 2,
                    "weight_bytes": 2 * distinct * r * (len(outs) * width + sum(outs)),
                    "y_bytes": 4 * tokens * sum(outs),
                }
            add(row)


def _in_turn(calls: list[Callable[[], Any]]) -> Callable[[], Any]:
    """Return a call of the next of them."""
    turn = itertools.cycle(calls)
    return lambda: next(turn)()


def fold(rehearse: bool, add: Callable[[dict[str, Any]], None]) -> None:
    """Time a fold of one layer's linears; bytes: W read once, W' written once. In place: to the
    next adapter, and back to the base, by the journal."""
    import torch

    from benchmarks.step import once
    from secura_serve.merge.fold import Part, Target
    from secura_serve.merge.fold.journal import Journal, journal_bits
    from secura_serve.merge.fold.shard import gather_shard
    from secura_serve.merge.fold.triton_fold import fold_in_place, fold_on_gpu, move, take_back
    from secura_serve.method import Basis, MagNorm

    device = torch.device("cpu" if rehearse else "cuda")
    dtype = torch.float32 if rehearse else torch.bfloat16
    linears = TINY if rehearse else LINEARS
    for norm, r in itertools.product((MagNorm("bounded"), MagNorm("none")), (16, 32, 64, 128)):
        if rehearse and r > 16:
            continue
        for width, out in sorted({(w, o) for w, outs in linears.values() for o in outs}):
            W = torch.randn(out, width, device=device).to(dtype)
            copy, flags = torch.empty_like(W), torch.zeros(2, dtype=torch.int32, device=device)
            basis = Basis(torch.randperm(out)[:r], torch.randperm(width)[:r])
            target = Target("m", (Part("a", 1.0, torch.randn(r, r) * 1e-3, basis, ""),))
            row: dict[str, Any] = {"norm": norm.mode, "r": r, "out": out, "in": width}
            moved, mine = move(target, (out, width), device), W.clone()
            parts, _ = gather_shard(W, target, slice(None), slice(None), checked=True)
            journal = Journal.empty(W, bits) if (bits := journal_bits(norm, dtype)) else None
            both = (journal, journal, moved.cores)
            calls: dict[str, Callable[[], object]] = {
                "fold": partial(fold_on_gpu, W, target, norm, dtype, flags, moved),
                "in_place": partial(fold_in_place, mine, target, norm, parts, flags, *both),
                "copy": partial(copy.copy_, W),
            }
            if journal is not None:
                journal.data.zero_()
                calls["back"] = partial(take_back, mine, journal, flags)
            for what, call in calls.items():
                # On a GPU one CUDA graph: in a server the bus is slower than launching.
                seconds = once(call, device) / 1e6
                row[f"{what}_us"] = round(seconds * 1e6, 1)
                row[f"{what}_gb_per_s"] = round(2 * W.nbytes / seconds / 1e9, 1)
            row["of_copy"] = round(row["copy_us"] / row["fold_us"], 3)
            add(row)


def _other(command: list[str], add: Callable[[dict[str, Any]], None]) -> None:
    """Run another benchmark of this folder and add its report."""
    out = Path(os.environ["SECURA_BENCH_PART"]).with_suffix(".other.json")
    done = subprocess.run([sys.executable, "-m", *command, "--out", str(out)], cwd=ROOT)
    if done.returncode:
        raise SystemExit(f"{command[0]} ended with status {done.returncode}")
    add(json.loads(out.read_text("utf-8")))
    out.unlink()


def train(rehearse: bool, add: Callable[[dict[str, Any]], None]) -> None:
    """Run ``benchmarks.train_step`` on random layers of Llama's shape."""
    if missing := [name for name in ("transformers", "peft") if find_spec(name) is None]:
        add({"skipped": f"{' and '.join(missing)} cannot be imported"})
        return
    few = ["--rounds", "2", "--warmup", "1", "--targets", "q,v", "--kinds", "lora", "u"]
    same = ["--base", "llama-2048x4", "--match", "equal rank", "--processes", "1"]
    _other(["benchmarks.train_step", *same, *(few if rehearse else ["--rounds", "11"])], add)


def serve(rehearse: bool, add: Callable[[dict[str, Any]], None]) -> None:
    """Run ``benchmarks.serve`` on a random 1B-class Llama."""
    if rehearse or find_spec("vllm") is None:
        add({"skipped": "vLLM cannot be imported" if not rehearse else "a rehearsal"})
        return
    once = ["benchmarks.serve", "--synthetic-gib", "2.5", "--repeat", "1", "--adapters"]
    _other([*once, "0", "1", "16", "64", "256"], add)
    # The same with the whole step after its linear.
    os.environ["SECURA_KERNEL"] = "triton-after"
    _other([*once, "64"], lambda report: add(report | {"kernel": "triton-after"}))


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": sys.version.split()[0]}
    for name in ("torch", "triton", "vllm", "transformers", "peft"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def _device() -> dict[str, Any]:
    import torch

    if not torch.cuda.is_available():
        return {"name": "cpu"}
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "capability": list(torch.cuda.get_device_capability()),
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
    }


def _run_part(name: str, file: Path, rehearse: bool) -> None:
    """Run one part here, with a line in ``file`` for each row as it comes."""
    with file.open("w", encoding="utf-8") as lines:

        def add(row: dict[str, Any]) -> None:
            lines.write(json.dumps(row) + "\n")
            lines.flush()

        {"kernels": kernels, "step": step, "fold": fold, "train": train, "serve": serve}[name](
            rehearse, add
        )


def _bounded(command: list[str], env: dict[str, str], seconds: float) -> tuple[int | str, str]:
    """Run a command and all that it starts for so long at most; return its status and stderr."""
    with tempfile.TemporaryFile("w+", encoding="utf-8") as said:
        process = subprocess.Popen(
            command, cwd=ROOT, env=env, stderr=said, text=True, start_new_session=True
        )
        status: int | str
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            status = "time was over"
            # Servers that a part has started end with it; what does not listen is ended below.
            os.killpg(process.pid, signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(_GRACE_S)
        finally:
            # Also where this process is stopped from outside: nothing stays behind.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        said.seek(0)
        return status, said.read()


def _above_0(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} minutes; must be more than 0")
    return value


def _earlier(file: Path, rehearsal: bool) -> dict[str, Any]:
    """Return the parts of earlier runs that are in a file."""
    try:
        held = json.loads(file.read_text("utf-8")) if file.exists() else {"rehearsal": rehearsal}
        parts: dict[str, Any] = held.get("parts", {})
    except (OSError, ValueError, AttributeError) as error:
        raise SystemExit(f"{file} is not a report of this command ({error}); give --out") from error
    if held.get("rehearsal", False) != rehearsal:
        kind = "measurements" if rehearsal else "a rehearsal"
        raise SystemExit(f"{file} holds {kind}, which this run would mix with; give --out")
    return parts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--minutes", type=_above_0, default=10, help="of one part (%(default)s)")
    parser.add_argument("--total", type=_above_0, default=30, help="minutes of all (%(default)s)")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes, on a CPU")
    parser.add_argument(
        "--out", type=out_file,
        help=f"JSON ({MEASURED.relative_to(ROOT)}; of a rehearsal {REHEARSED.relative_to(ROOT)})",
    )  # fmt: skip
    parser.add_argument("--one", choices=PARTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        _run_part(args.one, Path(os.environ["SECURA_BENCH_PART"]), args.rehearse)
        return
    end_on_terminate()
    device = {"name": "cpu"} if args.rehearse else _device()
    if device["name"] == "cpu" and not args.rehearse:
        raise SystemExit("no GPU is to be seen by torch; --rehearse tries the command on a CPU")
    if args.out is None:
        args.out = out_file(str(REHEARSED if args.rehearse else MEASURED))
    report = {"rehearsal": args.rehearse, "parts": _earlier(args.out, args.rehearse)}
    env = os.environ | {"TRITON_INTERPRET": "1"} if args.rehearse else dict(os.environ)
    begun, failed = time.monotonic(), []
    for name in args.parts:
        left = args.total * 60 - (time.monotonic() - begun)
        if left < 20:
            print(f"{name}: no time is left; run it with --parts {name}", file=sys.stderr)
            continue
        rows, start = args.out.with_suffix(f".{name}.rows"), time.monotonic()
        rows.unlink(missing_ok=True)
        command = [sys.executable, "-m", "benchmarks.gpu", "--one", name]
        command += ["--rehearse"] if args.rehearse else []
        env["SECURA_BENCH_PART"] = str(rows.absolute())
        part: dict[str, Any] = {"device": device, "versions": _versions(), "commit": commit()}
        part["machine"] = machine()
        status, said = _bounded(command, env, min(args.minutes * 60, left))
        part["status"], part["said"] = status, said.strip().splitlines()[-5:] if status else []
        part["seconds"] = round(time.monotonic() - start, 1)
        lines = rows.read_text("utf-8").splitlines() if rows.exists() else []
        part["rows"] = [json.loads(line) for line in lines]
        rows.unlink(missing_ok=True)
        wrong = part["status"] not in (0, "time was over")
        if wrong or not all(row.get("ok", True) for row in part["rows"]):
            failed.append(name)
        if part["rows"] or name not in report["parts"]:
            report["parts"][name] = part
        args.out.write_text(json.dumps(report, indent=1) + "\n", "utf-8")
        print(
            f"{name}: {len(part['rows'])} rows in {part['seconds']} s, status {part['status']}",
            file=sys.stderr,
        )
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}; see {args.out}")


if __name__ == "__main__":
    main()
