"""Random bases and adapters for the benchmarks: real shapes, numbers that do not matter."""

from __future__ import annotations

import json
from pathlib import Path

HIDDEN, WIDE, KV, VOCAB = 2048, 8192, 512, 32000  # Llama-3.2-1B's layers
PROJECTIONS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KV, HIDDEN),
    "self_attn.v_proj": (KV, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (WIDE, HIDDEN),
    "mlp.up_proj": (WIDE, HIDDEN),
    "mlp.down_proj": (HIDDEN, WIDE),
}


def make_base(folder: Path, gib: float, vocabulary: int = VOCAB) -> Path:
    """A random bfloat16 Llama of about ``gib`` GiB in shards of about 0.5 GiB."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    layer = 2 * sum(out * into for out, into in PROJECTIONS.values())
    layers = max(1, round((gib * 2**30 - 2 * vocabulary * HIDDEN) / layer))
    folder.mkdir(parents=True)
    LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=WIDE,
        num_attention_heads=HIDDEN // 64,
        num_key_value_heads=KV // 64,
        num_hidden_layers=layers,
        vocab_size=vocabulary,
        tie_word_embeddings=True,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(WIDE * HIDDEN, generator=generator).mul_(0.02).bfloat16()

    def matrix(out: int, into: int) -> torch.Tensor:
        # Shifted views of one sheet of noise: no two layers alike, and made in no time.
        shift = int(torch.randint(noise.numel(), (), generator=generator))
        return noise.roll(shift)[: out * into].view(out, into).clone()

    weight_map: dict[str, str] = {}
    groups = [list(range(i, min(i + 4, layers))) for i in range(0, layers, 4)]
    for i, group in enumerate(groups):
        tensors = {}
        if i == 0:
            embed = torch.randn(vocabulary, HIDDEN, generator=generator).mul_(0.02)
            tensors["model.embed_tokens.weight"] = embed.bfloat16()
            tensors["model.norm.weight"] = torch.ones(HIDDEN, dtype=torch.bfloat16)
        for n in group:
            for name, shape in PROJECTIONS.items():
                tensors[f"model.layers.{n}.{name}.weight"] = matrix(*shape)
            for name in ("input_layernorm", "post_attention_layernorm"):
                tensors[f"model.layers.{n}.{name}.weight"] = torch.ones(HIDDEN).bfloat16()
        file = f"model-{i + 1:05}-of-{len(groups):05}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    index = {"metadata": {"total_size": size(folder)}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def make_adapter(base: Path, target: Path, only: tuple[str, ...], mode: str, rank: int) -> Path:
    """A random adapter: its numbers do not matter for speed."""
    import torch

    from secura_serve import adapter as A
    from secura_serve.checkpoint import Checkpoint
    from secura_serve.method import MagNorm, auto_alpha, select

    checkpoint = Checkpoint(base)
    generator = torch.Generator().manual_seed(1)
    modules, prints = {}, {}
    for name in checkpoint.linears():
        if only and not name.endswith(only):
            continue
        W = checkpoint.weight(name)
        basis = select(W, rank, module=name)
        U = torch.randn(rank, rank, generator=generator) * 0.05 * auto_alpha(W, basis)
        modules[name] = A.CURModule(U, basis.rows.int(), basis.cols.int())
        prints[name] = A.fingerprint(W, basis)
    config = A.AdapterConfig(
        base_model_name_or_path=base.name,
        r=rank,
        target_modules=tuple(sorted({name.rpartition(".")[2] for name in modules})),
        base_fingerprint=prints,
        magnorm=MagNorm(mode),
    )
    return A.save(target, config, modules)


def make_adapters(base: Path, folder: Path, count: int, rank: int) -> list[Path]:
    """``count`` adapters on all linears that share one basis and differ in U."""
    import torch

    from secura_serve import adapter as A

    made = [make_adapter(base, folder / "a000", (), "none", rank)]
    first = A.load(made[0])
    generator = torch.Generator().manual_seed(2)
    for i in range(1, count):
        modules = {
            name: A.CURModule(
                cur.U * torch.randn(rank, rank, generator=generator), cur.rows, cur.cols
            )
            for name, cur in first.modules.items()
        }
        made.append(A.save(folder / f"a{i:03}", first.config, modules))
    return made


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
