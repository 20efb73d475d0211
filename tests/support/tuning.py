"""Tiny random models in memory, and PEFT models of them with random cores."""

from __future__ import annotations

from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from secura_serve.train import SecuraConfig, adapter_layers

VOCAB, R = 97, 4
_LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
SHAPES: dict[str, dict[str, int]] = {
    "llama": _LLAMA,
    "qwen2": _LLAMA,
    "gpt2": {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64},
}
TOKENS = torch.randint(0, VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))


def base(arch: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float64) -> Any:
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    config = AutoConfig.for_model(arch, vocab_size=VOCAB, **ends, **SHAPES[arch])
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    for name, value in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(value)
    # As if read from a bfloat16 checkpoint, so that other dtypes hold the same values.
    return model.to(torch.bfloat16).to(dtype).eval()


def tuned(model: Any, **settings: Any) -> Any:
    """A PEFT model with random cores."""
    settings = {"r": R, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | settings
    return shake(get_peft_model(model, SecuraConfig(**settings)))


def shake(model: Any, name: str = "default", seed: int = 1) -> Any:
    generator = torch.Generator().manual_seed(seed)
    for layer in adapter_layers(model, name).values():
        for values in (layer.secura_U, layer.secura_A, layer.secura_B):
            if name in values:
                values[name].data.normal_(generator=generator)
    return model


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model(TOKENS).logits
    return found
