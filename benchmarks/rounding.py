"""What rounding a folded adapter to bfloat16 or float16 costs in task score and KL.

    python -m benchmarks.rounding --data runs/data [--adapters iso-date iso-date-bounded]

The model computes in float32 throughout, so that only the rounding of the folded weights differs:
``float32`` is the fold as it is, ``nearest`` rounds once to the nearest (what secura-merge, the
loader and the running server do), ``stochastic`` rounds up or down with the right
expectation, ``compensated`` carries the rounding error along each row. Reported per adapter: the
share of the update's norm that is lost, held-out accuracy, KL from the float32 fold and from the
base on neutral English. ``--data`` is where ``benchmarks.adapters.make_data`` wrote.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks._report import out_file, report_head
from benchmarks.adapters.run import ITEMS, RECIPES
from secura_serve.bases import resolve_base
from secura_serve.evaluate import answers, score
from secura_serve.evaluate.neutral_text import neutral_texts
from secura_serve.merge import fold_weight, open_source, plan_fold
from secura_serve.train.methods.base import load_base

ROOT = Path(__file__).resolve().parents[1]
Rounding = Callable[[Tensor], Tensor]


def nearest(dtype: torch.dtype) -> Rounding:
    """To the nearest, ties to even."""
    return lambda W: W.to(dtype).float()


def stochastic(dtype: torch.dtype, seed: int) -> Rounding:
    """Up or down to a neighbour, with probability by distance: right on average."""
    generator = torch.Generator().manual_seed(seed)

    def rounded(W: Tensor) -> Tensor:
        near = W.to(dtype)
        away = torch.where(near.float() < W, math.inf, -math.inf).to(dtype)
        other = torch.nextafter(near, away)
        gap = (other.float() - near.float()).abs()
        share = torch.where(gap > 0, (W - near.float()).abs() / gap, 0)
        draw = torch.rand(W.shape, generator=generator)
        return torch.where(draw < share, other, near).float()

    return rounded


def compensated(dtype: torch.dtype) -> Rounding:
    """To the nearest of W plus the error that the row's earlier entries left."""

    def rounded(W: Tensor) -> Tensor:
        out, carry = torch.empty_like(W), torch.zeros(W.shape[0])
        for column in range(W.shape[1]):
            wanted = W[:, column] + carry
            out[:, column] = wanted.to(dtype).float()
            carry = wanted - out[:, column]
        return out

    return rounded


class Folded:
    """The base in float32, and the exact fold of one adapter."""

    def __init__(self, base: str, adapter: Path) -> None:
        self.model, self.tokenizer, _ = load_base(base, "float32", "cpu")
        source = open_source(base, [str(adapter)])
        plan = plan_fold(source, torch.float32)
        self.pristine, self.exact = {}, {}
        for target in plan.targets.values():
            W = source.checkpoint.weight(target.module)
            self.pristine[target.module] = W.float()
            self.exact[target.module] = fold_weight(
                W, target, plan.norm, torch.float32, measure=False
            )[0]

    def put(self, weights: dict[str, Tensor]) -> None:
        for name, W in weights.items():
            self.model.get_submodule(name).weight.data.copy_(W)

    @torch.no_grad()
    def logprobs(self, texts: list[str]) -> list[Tensor]:
        """log p at every position of the first 64 tokens of each text."""
        ids = [self.tokenizer(t, truncation=True, max_length=64)["input_ids"] for t in texts]
        return [
            F.log_softmax(self.model(torch.tensor([row])).logits[0, :-1].float(), -1) for row in ids
        ]


def kl(before: list[Tensor], after: list[Tensor]) -> float:
    """Mean KL(before ‖ after) per token, nats."""
    parts = [(p.exp() * (p - q)).sum(-1) for p, q in zip(before, after, strict=True)]
    return float(torch.cat(parts).double().mean())


def measure(name: str, data: Path, base: str) -> list[dict[str, Any]]:
    """One row per rounding of one adapter."""
    recipe = RECIPES[name]
    rows = [
        json.loads(line)
        for line in (data / f"{recipe.data or name}.test.jsonl").read_text().splitlines()
    ][:ITEMS]
    model = Folded(base, ROOT / "adapters" / name)
    texts = neutral_texts().texts
    plain = model.logprobs(texts)
    roundings: dict[str, Rounding] = {"float32": lambda W: W}
    for dtype in (torch.bfloat16, torch.float16):
        short = str(dtype).removeprefix("torch.")
        roundings[f"{short} nearest"] = nearest(dtype)
    roundings["bfloat16 stochastic"] = stochastic(torch.bfloat16, seed=0)
    roundings["bfloat16 compensated"] = compensated(torch.bfloat16)
    measured: list[dict[str, Any]] = []
    exact = None
    for rounding_name, rounding in roundings.items():
        weights = {m: rounding(W) for m, W in model.exact.items()}
        lost = sum(float((weights[m] - W).norm() ** 2) for m, W in model.exact.items())
        update = sum(float((model.pristine[m] - W).norm() ** 2) for m, W in model.exact.items())
        model.put(weights)
        after = model.logprobs(texts)
        exact = exact or after
        said = answers(
            model.model,
            model.tokenizer,
            [r["prompt"] for r in rows],
            max_new_tokens=recipe.max_new_tokens,
        )
        measured.append(
            {
                "adapter": name,
                "rounding": rounding_name,
                "share_of_update_lost": math.sqrt(lost / update),
                "accuracy": score(recipe.scoring, said, [r["completion"] for r in rows]),
                "items": len(rows),
                "kl_from_float32_fold": kl(exact, after),
                "kl_from_base": kl(plain, after),
            }
        )
        print(json.dumps(measured[-1]), flush=True)
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of make_data.py")
    parser.add_argument("--adapters", nargs="+", default=["iso-date", "iso-date-bounded"])
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--out", type=out_file, help="JSON to write")
    given = parser.parse_args()
    resolve_base(given.base)
    report = {
        **report_head("benchmarks.rounding", ("torch", "transformers")),
    }
    report["rows"] = [
        row for name in given.adapters for row in measure(name, given.data, given.base)
    ]
    if given.out:
        given.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
