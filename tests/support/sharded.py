"""A model of vLLM's own linears as one rank of many would hold it, without the other ranks."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import replace
from unittest.mock import patch

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from secura_serve import adapter as A
from secura_serve.checkpoint import Checkpoint
from secura_serve.merge import FoldPlan, open_source, plan_fold
from secura_serve.method import MagNorm
from secura_serve.serve.engine.fold.pristine import PristineCopies
from secura_serve.serve.engine.fold.shards import Shards
from secura_serve.serve.engine.worker_extension import with_siblings
from tests.support.oracle import _bounded

DTYPE = torch.float32
NOTHING = FoldPlan({}, MagNorm())
HEAD, HEADS, KV_HEADS, HIDDEN, MIDDLE = 16, 8, 2, 64, 96
SHAPES = {
    "self_attn.q_proj": (HEADS * HEAD, HIDDEN),
    "self_attn.k_proj": (KV_HEADS * HEAD, HIDDEN),
    "self_attn.v_proj": (KV_HEADS * HEAD, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HEADS * HEAD),
    "mlp.gate_proj": (MIDDLE, HIDDEN),
    "mlp.up_proj": (MIDDLE, HIDDEN),
    "mlp.down_proj": (HIDDEN, MIDDLE),
}
PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
_SHARD = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "gate_proj": 0, "up_proj": 1}


def write_base(folder, dtype, seed=0):
    """A checkpoint of two layers, of the linears alone."""
    gen = torch.Generator().manual_seed(seed)
    modules = [
        (f"model.layers.{i}.{name}", shape) for i in (0, 1) for name, shape in SHAPES.items()
    ]
    tensors = {f"{m}.weight": torch.randn(shape, generator=gen).to(dtype) for m, shape in modules}
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return folder


class Model(nn.Module):
    """Two decoder layers that hold what rank ``rank`` of ``size`` holds, and load as vLLM's do."""

    def __init__(self, base, rank, size, dtype):
        super().__init__()
        from vllm.config import VllmConfig, set_current_vllm_config
        from vllm.model_executor.layers import linear

        module = "vllm.model_executor"
        names = {"rank": rank, "world_size": size}
        with ExitStack() as stack:
            stack.enter_context(set_current_vllm_config(VllmConfig()))
            for place in (f"{module}.layers.linear", f"{module}.parameter"):
                for name, value in names.items():
                    target = f"{place}.get_tensor_model_parallel_{name}"
                    stack.enter_context(patch(target, lambda value=value: value))
            for i in (0, 1):
                kind = {"bias": False, "params_dtype": dtype}
                attention, mlp = nn.Module(), nn.Module()
                attention.qkv_proj = linear.QKVParallelLinear(HIDDEN, HEAD, HEADS, KV_HEADS, **kind)
                attention.o_proj = linear.RowParallelLinear(HEADS * HEAD, HIDDEN, **kind)
                mlp.gate_up_proj = linear.MergedColumnParallelLinear(HIDDEN, [MIDDLE] * 2, **kind)
                mlp.down_proj = linear.RowParallelLinear(MIDDLE, HIDDEN, **kind)
                layer = nn.ModuleDict({"self_attn": attention, "mlp": mlp})
                self.add_module(f"layer{i}", layer)
        self.load_weights(load_file(base / "model.safetensors").items())

    def linear(self, module):
        """The linear that holds a module, and the module's own name."""
        _, _, i, block, leaf = module.split(".")
        packed = next((name for name, parts in PACKED.items() if leaf in parts), leaf)
        return getattr(self.get_submodule(f"layer{i}.{block}"), packed), leaf

    def load_weights(self, weights):
        for name, tensor in weights:
            linear, leaf = self.linear(name.removesuffix(".weight"))
            shard = (_SHARD[leaf],) if leaf in _SHARD else ()
            linear.weight.weight_loader(linear.weight, tensor, *shard)


def whole(base, adapter=None):
    """Every linear's W, or W' of an adapter, in float64: module -> ``(out, in)``."""
    tensors = load_file(base / "model.safetensors")
    weights = {name.removesuffix(".weight"): W.double() for name, W in tensors.items()}
    if adapter is None:
        return weights
    held = A.load(adapter)
    norm = held.config.magnorm.to_json()
    for module, cur in held.modules.items():
        W, (rows, cols) = weights[module], cur.basis
        delta = W[:, cols.long()] @ cur.U.double() @ W[rows.long()]
        weights[module] = W + delta if norm is None else _bounded(W, delta, norm)
    return weights


def held_by(model, rank, size, weights):
    """Pairs of what lies in the model and what should, a pair for each linear of the checkpoint."""
    # Ranks that share a KV head hold the same rows.
    copies = max(1, size // KV_HEADS)
    for module, W in weights.items():
        linear, leaf = model.linear(module)
        if leaf in ("o_proj", "down_proj"):
            yield module, linear.weight, W.chunk(size, 1)[rank]
            continue
        q, kv, half = HEADS * HEAD // size, KV_HEADS * HEAD * copies // size, MIDDLE // size
        first, count = {
            "q_proj": (0, q),
            "k_proj": (q, kv),
            "v_proj": (q + kv, kv),
            "gate_proj": (0, half),
            "up_proj": (half, half),
        }[leaf]
        at = rank // copies if leaf in ("k_proj", "v_proj") else rank
        yield module, linear.weight[first : first + count], W[at * count : (at + 1) * count]


class Rank:
    """One rank's model and what it keeps of the base: the worker's part of a fold."""

    def __init__(self, base, rank=0, size=1, dtype=DTYPE, spoil=None, room=10**9, **settings):
        self.base, self.rank, self.size, self.dtype = base, rank, size, dtype
        self.model = Model(base, rank, size, dtype)
        if spoil is not None:
            spoil(self.model)
        self.copies = PristineCopies(room=room, pin=torch.clone)
        checkpoint = Checkpoint(base)

        def siblings(modules):
            return with_siblings(modules, PACKED, checkpoint.linears())

        self.shards = Shards(self.model, checkpoint, siblings, self.copies, **settings)
        self.dirty = set()

    def plan(self, adapter):
        return plan_fold(open_source(str(self.base), [str(adapter)]), self.dtype)

    def fold(self, adapter=None, plan=None, checked=False):
        """As the worker does it, but for the reload of what is left."""
        plan = plan or (self.plan(adapter) if adapter else NOTHING)
        plan = replace(plan, checked=checked)
        self.dirty |= {target.module for target in plan.targets.values()}
        base = Checkpoint(self.base)
        taken = self.shards.take(base, plan, self.dirty)
        self.shards.put(base, plan, taken)
        self.dirty = {target.module for target in plan.targets.values()}
        return taken

    def check(self, adapter=None):
        """What lies there is the rank's part of W', to float32; of the base, to the last bit."""
        want = whole(self.base, adapter)
        for module, held, part in held_by(self.model, self.rank, self.size, want):
            if adapter is None:
                assert torch.equal(held, part.to(self.dtype)), module
            else:
                near = 3e-6 if self.dtype == torch.float32 else 2e-3
                torch.testing.assert_close(held.double(), part, atol=near, rtol=near, msg=module)


def blind(plan):
    """The same with ρ_max unknown, which only all of W can tell."""
    targets = {
        name: replace(t, parts=tuple(replace(part, rho_max=None) for part in t.parts))
        for name, t in plan.targets.items()
    }
    return replace(plan, targets=targets)
