"""Tiny random checkpoints of every supported architecture, with a working chat tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

ARCHS = ("llama", "qwen2", "gemma2", "mistral", "gpt2")
VOCAB = 2048

# Shapes that vLLM serves on CPU: heads of 64, grouped queries; in, out and kv sizes all differ.
_COMMON = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
_LLAMA_LIKE = _COMMON | {
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 512,
}
_SHAPES: dict[str, dict[str, object]] = {
    "llama": _LLAMA_LIKE | {"tie_word_embeddings": False},
    "qwen2": _LLAMA_LIKE | {"tie_word_embeddings": True},
    "gemma2": _LLAMA_LIKE | {"query_pre_attn_scalar": 64, "sliding_window": 128},
    "mistral": _LLAMA_LIKE | {"sliding_window": None, "tie_word_embeddings": False},
    "gpt2": _COMMON | {"n_embd": 256, "n_head": 4, "n_layer": 2, "n_positions": 512},
}


def write_model(arch: str, folder: Path) -> None:
    """Write random float32 weights, the same each time for the same architecture."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    config = AutoConfig.for_model(arch, **_SHAPES[arch])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1 + ARCHS.index(arch))
    with torch.no_grad():
        for name, value in model.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            if value.ndim == 2 and ("embed" in name or "wte" in name or "wpe" in name):
                value.copy_(0.1 * noise)
            elif value.ndim == 2:
                # Layers outweigh the embedding they add to; otherwise a model with tied embeddings
                # repeats its last token for ever, and wrong adapters would go unnoticed.
                fan_in = value.shape[0] if arch == "gpt2" else value.shape[1]
                value.copy_(3 * noise / fan_in**0.5)
            elif name.endswith("bias"):
                value.copy_(0.3 * noise)
            else:
                # Norm weights off their start, so that a test notices when one is dropped.
                value.add_(0.1 * noise)
                # Gemma multiplies the embedding by 16 and norms what each layer adds.
                if arch == "gemma2" and "post_" in name:
                    value.add_(4)
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2)
    model.save_pretrained(folder)


def write_tokenizer(source: Path, folder: Path) -> None:
    """Write SmolLM2's tokenizer cut to its first tokens: still byte-level."""
    full = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    model = full["model"]
    model["vocab"] = {t: i for t, i in model["vocab"].items() if i < VOCAB}
    model["merges"] = [pair for pair in model["merges"] if pair[0] + pair[1] in model["vocab"]]
    (folder / "tokenizer.json").write_text(json.dumps(full), encoding="utf-8")
    settings = json.loads((source / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings["model_max_length"] = 512
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    template = (source / "chat_template.jinja").read_text(encoding="utf-8")
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
