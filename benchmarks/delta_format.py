"""What the formats of a resident update lose of it, beside a fold in bfloat16.

    python -m benchmarks.delta_format [--adapters NAME ...] [--checkpoints DIR ...]

A place of ``secura-serve --resident`` holds D = W' − W in 8 bits with a scale for each row. Here D
of each adapter (or fine-tune) is put through that format and through others, and the model computes
in float32 with W + D̂: reported are ‖D̂ − D‖ / ‖D‖ and the mean KL(exact ‖ D̂) per token on neutral
English, beside the same for W' rounded to bfloat16, which is what a fold into an engine serves.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks._report import out_file, report_head
from benchmarks.rounding import ROOT, kl
from secura_serve.bases import resolve_base
from secura_serve.checkpoint import Checkpoint
from secura_serve.evaluate.neutral_text import neutral_texts
from secura_serve.merge import open_source, plan_fold, update_stream
from secura_serve.method import dequantise_rows, quantise_rows
from secura_serve.serve.app.adapters.content.fine_tune import FineTune, updates_of
from secura_serve.train.methods.base import load_base

Format = Callable[[Tensor, Tensor], Tensor]
"""``(W, D) -> D̂``, both ``(out, in)`` float32."""


def bfloat16_fold(W: Tensor, D: Tensor) -> Tensor:
    """Return what is left of D where W + D is rounded to bfloat16."""
    return (W + D).to(torch.bfloat16).float() - W


def rows(W: Tensor, D: Tensor) -> Tensor:
    """Return D in 8 bits with a scale for each row."""
    return dequantise_rows(*quantise_rows(D))


def groups(size: int, levels: int) -> Format:
    """Return D with a scale for each ``size`` columns of a row, in ±``levels`` steps."""

    def encoded(W: Tensor, D: Tensor) -> Tensor:
        parts = D.split(size, dim=1)
        scales = [part.abs().amax(1, keepdim=True).clamp_min(1e-30) / levels for part in parts]
        return torch.cat([(p / s).round() * s for p, s in zip(parts, scales, strict=True)], 1)

    return encoded


def low_rank(k: int) -> Format:
    """Return the nearest D of rank k, which a LoRA of that rank can be (truncated SVD)."""

    def encoded(W: Tensor, D: Tensor) -> Tensor:
        U, S, V = torch.linalg.svd(D, full_matrices=False)
        return (U[:, :k] * S[:k]) @ V[:k]

    return encoded


def factor_bytes(k: int) -> Callable[[int, int], float]:
    """Return the bytes of two bfloat16 factors of rank k, by the shape of D."""
    return lambda out, inner: 2.0 * k * (out + inner)


FORMATS: dict[str, tuple[Format, float | Callable[[int, int], float]]] = {
    "exact (float32)": (lambda W, D: D, 4),
    "fold in bfloat16": (bfloat16_fold, 2),
    "int8, a scale a row": (rows, 1),
    "int8, a scale for 64": (groups(64, 127), 1 + 4 / 64),
    "int4, a scale for 32": (groups(32, 7), 0.5 + 4 / 32),
    "LoRA of rank 16": (low_rank(16), factor_bytes(16)),
}
"""Name -> the format, and its bytes for each number (without a row's scale), or for a D."""


def updates(base: Checkpoint, named: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield module and D of an adapter's folder, or of a checkpoint's."""
    if (named / "adapter_config.json").is_file():
        source = open_source(str(base.path), [str(named)])
        yield from update_stream(source, plan_fold(source))
    else:
        yield from updates_of(named, base, FineTune.load(named, base).modules)


@torch.no_grad()
def logprobs(model: Any, tokenizer: Any, texts: list[str]) -> list[Tensor]:
    """Return log p at every position of the first 96 tokens of each text."""
    ids = [tokenizer(text, truncation=True, max_length=96)["input_ids"] for text in texts]
    return [model(torch.tensor([row])).logits[0, :-1].float().log_softmax(-1) for row in ids]


def measure(named: Path, base: Checkpoint, model: Any, tokenizer: Any) -> list[dict[str, Any]]:
    """Return a row for each format."""
    texts = neutral_texts().texts
    changes = dict(updates(base, named))
    pristine = {module: base.weight(module).float() for module in changes}
    plain = logprobs(model, tokenizer, texts)
    exact: list[Tensor] = []
    measured = []
    for name, (form, width) in FORMATS.items():
        lost = whole = size = numbers = 0.0
        for module, D in changes.items():
            W = pristine[module]
            kept = form(W, D)
            lost += float((kept - D).norm()) ** 2
            whole += float(D.norm()) ** 2
            size += width(*D.shape) if callable(width) else width * D.numel()
            numbers += D.numel()
            model.get_submodule(module).weight.data.copy_(W + kept)
        after = logprobs(model, tokenizer, texts)
        exact = exact or after
        measured.append(
            {
                "adapter": named.name,
                "format": name,
                "bytes_per_number": round(size / numbers, 3),
                "share_of_update_lost": math.sqrt(lost / whole),
                "kl_from_exact": kl(exact, after),
                "kl_from_base": kl(plain, after),
                "tokens": sum(len(p) for p in plain),
            }
        )
        print(json.dumps(measured[-1]), flush=True)
    for module, W in pristine.items():
        model.get_submodule(module).weight.data.copy_(W)
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    shipped = ["iso-date-bounded", "iso-date-bounded-ab"]
    parser.add_argument("--adapters", nargs="*", default=shipped, help="folders below adapters/")
    parser.add_argument("--checkpoints", nargs="*", type=Path, default=[], help="fine-tunes")
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--out", type=out_file, help="JSON to write")
    given = parser.parse_args()
    base = Checkpoint(resolve_base(given.base).path)
    model, tokenizer, _ = load_base(given.base, "float32", "cpu")
    report = {
        **report_head("benchmarks.delta_format", ("torch", "transformers")),
    }
    named = [*(ROOT / "adapters" / name for name in given.adapters), *given.checkpoints]
    report["rows"] = [row for path in named for row in measure(path, base, model, tokenizer)]
    if given.out:
        given.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
