"""The base model of a run: weights, tokenizer and the id that an adapter records."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.pytorch_utils import Conv1D

from secura_serve.bases import resolve_base
from secura_serve.errors import BaseModelError

__all__ = ["last_names", "linear_layers", "load_base", "load_tokenizer"]


def load_tokenizer(name: str) -> Any:
    """Return the base's tokenizer; without a padding token it pads with the end-of-sequence one."""
    tokenizer = AutoTokenizer.from_pretrained(resolve_base(name).path)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_base(name: str, dtype: str, device: str = "auto") -> tuple[Any, Any, str]:
    """Return the base model, its tokenizer and the id that an adapter records.

    Raises:
        BaseModelError: no such base, or its weights are damaged.
    """
    base = resolve_base(name)
    tokenizer = load_tokenizer(name)
    softcap = getattr(AutoConfig.from_pretrained(base.path), "attn_logit_softcapping", None)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            base.path,
            dtype=getattr(torch, dtype),
            # Gemma 2: transformers' faster attention leaves out the soft-capping.
            attn_implementation="eager" if softcap else None,
        )
    except (OSError, SafetensorError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise BaseModelError(f"the weights in {base.path} cannot be read: {reason}") from error
    if (head := model.get_output_embeddings()) is not None:
        head.register_forward_pre_hook(_contiguous)
    if device == "auto" and torch.cuda.is_available():
        model = model.to("cuda")
    return model, tokenizer, base.model_id


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the linear layers of a model, by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D))}


def last_names(names: Iterable[str]) -> str:
    """Return the last parts of module names, each once: ``k_proj, q_proj``."""
    return ", ".join(sorted({name.rpartition(".")[2] for name in names}))


def _contiguous(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Give the output layer a contiguous input.

    For a slice of the columns torch copies the whole weight for each row of the batch; that was a
    third of a training step of SmolLM2-135M on a CPU.
    """
    return (inputs[0].contiguous(), *inputs[1:])
