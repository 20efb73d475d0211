"""The adapter step of one linear alone, against stock vLLM's LoRA step and the base GEMM.

    python -m benchmarks.step [--sizes 2048 4096 8192] [--ranks 8 16 32 64 128]
        [--tokens 1 16 64 512] [--adapters 1 16 256] [--threads 1] [--out results/step.json]

Square linears, bfloat16, every token of a batch with the next adapter in turn. The three are timed
in turns. LoRA is what vLLM runs on this kind of device (its Triton kernels, or torch on a CPU);
without vLLM that column is left out.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks._report import out_file, report_head
from secura_serve.serve.engine.bank import Bank
from secura_serve.serve.kernels import choose_kernel

DTYPE = torch.bfloat16
BUDGET = 0.4


def packed(
    outs: Sequence[int],
    r: int,
    tokens: int,
    adapters: int,
    device: torch.device,
    *,
    active: bool = True,
    activation: str | None = None,
    linear: tuple[torch.Tensor, torch.Tensor] | None = None,
    after: bool = False,
    kernel: Any = None,
) -> Callable[[], Any]:
    """The adapter step of a linear whose outputs are those of several, side by side.

    Args:
        active: whether the batch has adapters.
        activation: what follows the linear and takes the step along.
        linear: x and W of a linear that is taken along, too, by a kernel that can.
        after: whether the whole step follows that linear, as in a graph of a model.
        kernel: by default the one that would serve.
    """
    kernel, n = kernel or choose_kernel(device, DTYPE), len(outs)
    starts = [0, *itertools.accumulate(outs)]
    layout = kernel.layout(n, r, DTYPE)
    names = [f"linear{s}" for s in range(n)]
    bank = Bank(adapters, [(names, layout)], DTYPE, device)
    for slot in range(adapters):
        bank.put(slot, *bank.pack({name: torch.randn(r, r) * 0.01 for name in names}))
    rows = torch.full((n, layout.r), -1)
    for s, out in enumerate(outs):
        rows[s, :r] = starts[s] + torch.randperm(out)[:r]
    C = torch.zeros(layout.r, starts[-1], dtype=DTYPE, device=device)
    C[:r] = torch.randn(r, starts[-1]).to(device, DTYPE) * 0.01
    state = kernel.prepare(rows, C, None, starts)
    y = torch.zeros(tokens, starts[-1], dtype=DTYPE, device=device)
    slots = (torch.arange(tokens) % adapters).to(device)
    held = (bank.part(0), bank.ranks, state, torch.tensor(active))
    if linear is not None and not after:
        return lambda: kernel.linear(*linear, None, None, slots, *held, activation)
    if linear is not None:
        follow = () if activation is None else (activation,)
        step = kernel.step if activation is None else kernel.activated_step
        return lambda: step(torch.nn.functional.linear(*linear), None, slots, *held, *follow)
    if activation is not None:
        return lambda: kernel.activated_step(y, None, slots, *held, activation)
    return lambda: kernel.step(y, None, slots, *held)


def lora_packed(
    width: int, outs: Sequence[int], r: int, tokens: int, adapters: int, device: torch.device
) -> Callable[[], Any] | None:
    """LoRA's step by vLLM's own kernels; None without vLLM."""
    try:
        from vllm.lora.layers import LoRAMapping
        from vllm.lora.punica_wrapper import get_punica_wrapper
    except ImportError:
        return None
    from types import SimpleNamespace

    settings = SimpleNamespace(
        max_loras=adapters, fully_sharded_loras=False, specialize_active_lora=False
    )
    wrapper = get_punica_wrapper(
        max(tokens, 64), max_batches=max(tokens, 64), device=device, lora_config=settings,
        max_loras=adapters,
    )  # fmt: skip
    wanted = tuple(i % adapters + 1 for i in range(tokens))
    mapping = LoRAMapping(wanted, wanted, is_prefill=True)
    wrapper.update_metadata(mapping, [*range(1, adapters + 1)], adapters + 1, 32000)
    x = torch.randn(tokens, width).to(device, DTYPE)
    y = torch.zeros(tokens, sum(outs), dtype=DTYPE, device=device)
    scaled = {"dtype": DTYPE, "device": device}
    A = tuple(torch.randn(adapters, 1, r, width, **scaled) * 0.01 for _ in outs)
    B = tuple(torch.randn(adapters, 1, out, r, **scaled) * 0.01 for out in outs)
    return lambda: wrapper.add_lora_linear(y, x, A, B, 1.0, tuple(outs))


def gemm(size: int, tokens: int, device: torch.device) -> Callable[[], Any]:
    W = torch.randn(size, size, device=device).to(DTYPE)
    x = torch.randn(tokens, size, device=device).to(DTYPE)
    return lambda: torch.nn.functional.linear(x, W)


def once(call: Callable[[], Any], device: torch.device) -> float:
    """Microseconds of one call: many in a row, on a GPU as one CUDA graph."""
    if device.type == "cuda":
        return _graph(call)
    start, count = time.perf_counter(), 0
    while (spent := time.perf_counter() - start) < BUDGET / 5 or not count:
        call()
        count += 1
    return spent / count * 1e6


def _graph(call: Callable[[], Any], calls: int = 20, repeat: int = 20) -> float:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(calls):
            call()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    graph.replay()
    begin.record()
    for _ in range(repeat):
        graph.replay()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) * 1e3 / (calls * repeat)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--sizes", type=int, nargs="+", default=[2048, 4096, 8192])
    add("--ranks", type=int, nargs="+", default=[8, 16, 32, 64, 128])
    add("--tokens", type=int, nargs="+", default=[1, 16, 64, 512])
    add("--adapters", type=int, nargs="+", default=[1, 16, 256])
    add("--repeat", type=int, default=5)
    add("--threads", type=int, default=1, help="of the CPU (%(default)s)")
    add("--out", type=out_file, help="JSON to write")
    given = parser.parse_args()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    report = {
        **report_head("benchmarks.step", ("torch",)),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "threads": given.threads,
        "kernel": choose_kernel(device, DTYPE).name,
        "rows": [],
    }
    for size, r, tokens, adapters in itertools.product(
        given.sizes, given.ranks, given.tokens, given.adapters
    ):
        calls = {
            "base_gemm_us": gemm(size, tokens, device),
            "ours_us": packed((size,), r, tokens, adapters, device),
            "lora_us": lora_packed(size, (size,), r, tokens, adapters, device),
        }
        samples: dict[str, list[float]] = {name: [] for name, call in calls.items() if call}
        for _ in range(given.repeat):
            for name, times in samples.items():
                if sum(times) < 5e6:
                    times.append(once(calls[name], device))
        row: dict[str, Any] = {"size": size, "r": r, "tokens": tokens, "adapters": adapters}
        row |= {name: round(statistics.median(times), 2) for name, times in samples.items()}
        row["of_gemm"] = round(row["ours_us"] / row["base_gemm_us"], 4)
        if "lora_us" in row:
            row["lora_over_ours"] = round(row["lora_us"] / row["ours_us"], 1)
        report["rows"].append(row)
        print(json.dumps(row), flush=True)
    if given.out:
        given.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
