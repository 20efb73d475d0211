"""What an answer should be, computed without this package: transformers on W + C·U·R.

Reads the adapter's files itself and builds C·U·R (and ``bounded`` and ``published``, and plain
LoRA's B·A) in float64, so that agreement with the server checks selection, format, loading, layers
and scheduling at once.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D


def adapted(base: Path, adapter: Path | None, dtype: torch.dtype = torch.float32):
    """A transformers model with the adapter folded in; float64 arithmetic, one rounding.

    A folder with a whole checkpoint is that model.
    """
    whole = adapter if adapter and (adapter / "config.json").is_file() else None
    # Eager attention: transformers' SDPA path leaves Gemma 2's softcapping out.
    model = AutoModelForCausalLM.from_pretrained(
        whole or base, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    if whole:
        return model.to(dtype)
    tensors = load_file(adapter / "adapter_model.safetensors") if adapter else {}
    config = json.loads((adapter / "adapter_config.json").read_text()) if adapter else {}
    norm = config.get("magnorm")
    for key in [k for k in tensors if k.endswith(".lora_A.weight")]:
        stem = key.removesuffix("A.weight")
        linear = model.get_submodule(stem.removeprefix("base_model.model.")[: -len(".lora_")])
        delta = tensors[stem + "B.weight"].double() @ tensors[key].double()
        scaled = linear.weight.data.double() + delta * config["lora_alpha"] / config["r"]
        linear.weight.data = scaled.float()
    for key in [k for k in tensors if k.endswith(".secura_U")]:
        stem = key.removesuffix("U")
        linear = model.get_submodule(stem.removeprefix("base_model.model.")[: -len(".secura_")])
        transposed = isinstance(linear, Conv1D)
        W = linear.weight.data.double()
        W = W.T if transposed else W
        C, R = W[:, tensors[stem + "cols"].long()], W[tensors[stem + "rows"].long()]
        delta = C @ tensors[key].double() @ R
        if norm is None:
            new = (W + delta).float()
        elif norm["mode"] == "published":
            ratio = delta.abs() / (W.abs() + norm["eps"])
            peak = tensors[stem + "rho_max"].double()
            res = 2 - torch.sigmoid(norm["scale"] * (ratio / peak - 0.5))
            new = ((2 * W + delta) / res).float()
        else:
            new = _bounded(W, delta, norm).float()
        linear.weight.data = new.T.contiguous() if transposed else new
    return model.to(dtype)


def mixed(base: Path, parts: list[tuple[Path, float]]):
    """A transformers model on W + Σ wᵢ·Cᵢ·Uᵢ·Rᵢ, summed in float64, rounded once.

    With ``bounded`` adapters, which must all have one tau, the bound acts on the sum.
    """
    model, norm = adapted(base, None), None
    sums: dict[str, torch.Tensor] = {}
    for path, weight in parts:
        tensors = load_file(path / "adapter_model.safetensors")
        norm = json.loads((path / "adapter_config.json").read_text()).get("magnorm")
        for key in [k for k in tensors if k.endswith(".secura_U")]:
            stem = key.removesuffix("U")
            module = stem.removeprefix("base_model.model.")[: -len(".secura_")]
            W = model.get_submodule(module).weight.data.double()
            C, R = W[:, tensors[stem + "cols"].long()], W[tensors[stem + "rows"].long()]
            sums[module] = sums.get(module, 0) + weight * (C @ tensors[key].double() @ R)
    for module, delta in sums.items():
        linear = model.get_submodule(module)
        W = linear.weight.data.double()
        linear.weight.data = (W + delta if norm is None else _bounded(W, delta, norm)).float()
    return model


def _bounded(W: torch.Tensor, delta: torch.Tensor, norm: dict) -> torch.Tensor:
    assert norm["mode"] == "bounded"
    reach = norm["tau"] * W.abs()
    return torch.where(reach > 0, W + reach * torch.tanh(delta / reach), W)


@torch.no_grad()
def logprobs(model, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """log p of every vocabulary entry at each answer position: ``(len(answer), vocab)``."""
    ids = torch.tensor([prompt + answer])
    scores = model(ids, logits_to_keep=len(answer) + 1).logits[0, :-1].float()
    return scores.log_softmax(-1)
