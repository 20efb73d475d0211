"""Export to a plain PEFT LoRA folder, for software that knows LoRA only.

Without a norm Δ = C·U·R *is* a LoRA: lora_B · lora_A with lora_alpha = r, that is, scale 1. With
``bounded`` or ``published`` W' − W has full rank, and only an approximation can be had.

llama.cpp's convert_lora_to_gguf.py, as it comes with llama-cpp-python 0.3.36, was run on exports
for Llama, Mistral, Qwen2, Gemma 2 and SmolLM2 (iso-date): every factor arrives, equal in float32.
It transposes GPT-2's Conv1D where it should not, in LoRAs that PEFT wrote too: fold those instead.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from secura_serve.adapter.format import CONFIG_NAME, WEIGHTS_NAME
from secura_serve.errors import MergeError
from secura_serve.merge.fold import Part, Target, fold_weight, gather_target
from secura_serve.merge.io.files import new_folder
from secura_serve.merge.manifest import MANIFEST, describe
from secura_serve.merge.plan import space_problems
from secura_serve.merge.source import Source, plan_fold
from secura_serve.method import MagNorm, gather

__all__ = ["approximate", "exact", "export_lora"]

# Up to this size of the smaller side the SVD is exact, above it randomised.
_DENSE_SVD = 1024


def exact(W: Tensor, parts: tuple[Part, ...]) -> tuple[Tensor, Tensor, str]:
    """Return lora_A ``(Σr, in)`` and lora_B ``(out, Σr)`` in float32 with lora_B·lora_A = Σ wᵢΔᵢ.

    U goes to one side: (U·R, C) or (R, C·U). The other side holds the base's own numbers, which
    no server rounds again when it casts the adapter to the base's dtype; the side that U goes to
    does get rounded, by at most ε‖C‖‖U·R‖ or ε‖C·U‖‖R‖ in all. The smaller of the two is taken.

    Args:
        W: pristine, ``(out, in)``.

    Returns:
        A, B and where U went: ``"A"`` or ``"B"``, one letter per part.
    """
    down, up, sides = [], [], ""
    for part in parts:
        C, R = (t.to(torch.float32) for t in gather(W, part.basis))
        U = part.weight * part.U.to(torch.float32)
        UR, CU = U @ R, C @ U
        side = "A" if C.norm() * UR.norm() <= CU.norm() * R.norm() else "B"
        down.append(UR if side == "A" else R)
        up.append(C if side == "A" else CU)
        sides += side
    return torch.cat(down), torch.cat(up, 1), sides


@torch.no_grad()
def approximate(
    W: Tensor, target: Target, norm: MagNorm, rank: int
) -> tuple[Tensor, Tensor, float]:
    """Return the best rank-``rank`` lora_A, lora_B of W' − W in float32, and ‖W'−W−BA‖ / ‖W'−W‖.

    By SVD (Eckart-Young), the singular values shared evenly. Where the smaller side of W exceeds
    1024, a randomised SVD with a fixed seed (Halko et al. 2011, 16 extra directions, 4 power
    iterations) comes close to it; the error returned is measured either way.

    Args:
        W: pristine, ``(out, in)``.
    """
    plain = W.to(torch.float32)
    alone = Target(target.module, target.parts)
    update = fold_weight(plain, alone, norm, torch.float32, measure=False)[0]
    update -= plain
    if min(update.shape) <= _DENSE_SVD:
        left, values, right = torch.linalg.svd(update, full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            left, values, V = torch.svd_lowrank(update, rank + 16, niter=4)
        right = V.T
    root = values[:rank].sqrt()
    A, B = root[:, None] * right[:rank], left[:, :rank] * root
    size = float(update.norm())
    return A, B, float((update - B @ A).norm()) / size if size else 0.0


def export_lora(
    source: Source, out: Path, *, rank: int | None = None, dtype: torch.dtype | None = None
) -> dict[str, Any]:
    """Write a LoRA folder that stock PEFT, vLLM and llama.cpp's converter read.

    Args:
        rank: None for the exact export of ``none``; else the best approximation of that rank.

    Returns:
        What is written to ``secura_manifest.json``; ``modules`` has the side that U went to, or
        the measured error.

    Raises:
        MergeError: a norm that has no exact LoRA, another base, an output that exists.

    Peak memory: one tensor and its SVD's work space, and the LoRA itself.
    """
    if rank is None and not source.norm.additive:
        raise MergeError(
            f"an adapter with S-MagNorm {source.norm.mode!r} changes weights at full rank, so no "
            "LoRA equals it: merge it into a checkpoint, or ask for --approximate --rank k, which "
            "says how far off it is"
        )
    plan = plan_fold(source)
    problems: list[str] = []
    tensors: dict[str, tuple[Tensor, Tensor]] = {}
    modules: dict[str, Any] = {}
    for target in tqdm(plan.targets.values(), desc=out.name, disable=None):
        W = source.checkpoint.weight(target.module)
        problems += gather_target(W.T if target.transposed else W, target)[1]
        if problems:
            continue
        if rank is None:
            A, B, modules[target.module] = exact(W, target.parts)
        else:
            if rank > min(W.shape):
                problems.append(f"{target.module}: rank {rank} exceeds {tuple(W.shape)}")
                continue
            A, B, modules[target.module] = approximate(W, target, source.norm, rank)
        if not (torch.isfinite(A).all() and torch.isfinite(B).all()):
            problems.append(f"{target.module}: NaN or Inf")
        tensors[target.module] = A.to(dtype or A.dtype), B.to(dtype or B.dtype)
    problems += space_problems(out, sum(A.nbytes + B.nbytes for A, B in tensors.values()))
    if problems:
        raise MergeError(f"{out} was not written:", problems)
    return _save(source, out, tensors, modules, "exact" if rank is None else "approximate")


def _save(
    source: Source,
    out: Path,
    tensors: dict[str, tuple[Tensor, Tensor]],
    modules: dict[str, Any],
    kind: str,
) -> dict[str, Any]:
    r = max(A.shape[0] for A, _ in tensors.values())
    entries = {}
    for module, (A, B) in tensors.items():
        # One rank for all, since rank patterns are not read everywhere; zeros change nothing.
        more = r - A.shape[0]
        for letter, padded in (
            ("A", torch.nn.functional.pad(A, (0, 0, 0, more))),
            ("B", torch.nn.functional.pad(B, (0, more))),
        ):
            key = f"base_model.model.{module}.lora_{letter}.weight"
            entries[key] = padded.contiguous()
    facts = describe(source) | {"lora": kind, "r": r, "modules": modules}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": source.model_id,
        "r": r,
        "lora_alpha": r,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(source.checkpoint.is_conv1d(m) for m in tensors),
        "target_modules": _suffixes(set(tensors), source.checkpoint.linears()),
        "inference_mode": True,
    }
    with new_folder(out) as work:
        save_file(entries, work / WEIGHTS_NAME, metadata={"format": "pt"})
        (work / MANIFEST).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        (work / "README.md").write_text(_card(out.name, facts), encoding="utf-8")
        # safetensors makes its files private; a LoRA is as readable as its card.
        shutil.copymode(work / "README.md", work / WEIGHTS_NAME)
        (work / CONFIG_NAME).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    return facts


def _suffixes(modules: set[str], linears: list[str]) -> list[str]:
    """Return last names where they match just these modules, else the full names."""
    last = {m.rpartition(".")[2] for m in modules}
    return sorted(
        last if {m for m in linears if m.rpartition(".")[2] in last} == modules else modules
    )


def _card(name: str, facts: dict[str, Any]) -> str:
    if facts["lora"] == "exact":
        sides = list(facts["modules"].values())
        said = (
            "The export is exact (float32 rounding aside): ΔW = C·U·R needs no approximation. U "
            f"was multiplied into lora_A in {sum(s.count('A') for s in sides)} places and into "
            f"lora_B in {sum(s.count('B') for s in sides)}, where it loses less to rounding; the "
            "other factor is rows or columns of the base."
        )
    else:
        said = (
            f"An approximation of rank {facts['r']}: ‖W′ − W − B·A‖ is at most "
            f"{max(facts['modules'].values()):.3g} of ‖W′ − W‖, layer by layer in `{MANIFEST}`."
        )
    names = ", ".join(f"`{a['name']}` (weight {a['weight']:g})" for a in facts["adapters"])
    return f"""---
base_model: {facts["base"]}
library_name: peft
tags: [lora, secura, cur]
---
# {name}

{names} as a plain LoRA for `{facts["base"]}`: rank {facts["r"]}, lora_alpha {facts["r"]}. {said}
"""
