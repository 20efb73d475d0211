"""Proves that Checkpoint gives the same names, weights and biases as transformers' own module tree
(the oracle) for every architecture, and that damaged checkpoints are refused with every fault.

Needs transformers for the oracle and tiny random checkpoints; no network.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from secura_serve.checkpoint import Checkpoint
from secura_serve.errors import BaseModelError
from tests.support.bases import ARCHS

TinyBase = Callable[[str], Path]


def _oracle(folder: Path) -> dict[str, torch.nn.Module]:
    from transformers import AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    model = AutoModelForCausalLM.from_pretrained(folder)
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and name != "lm_head"
    }


@pytest.mark.parametrize("arch", ARCHS)
def test_agrees_with_transformers(arch: str, tiny_base: TinyBase) -> None:
    checkpoint, oracle = Checkpoint(tiny_base(arch)), _oracle(tiny_base(arch))
    assert set(checkpoint.linears()) == set(oracle)
    assert checkpoint.config["model_type"] == arch
    for name, module in oracle.items():
        expected = module.weight.T if arch == "gpt2" else module.weight
        weight = checkpoint.weight(name)
        assert torch.equal(weight, expected) and weight.is_contiguous()
        assert checkpoint.shape(name) == tuple(expected.shape)
        bias = checkpoint.bias(name)
        if module.bias is None:
            assert bias is None
        else:
            assert bias is not None and torch.equal(bias, module.bias) and bias.abs().max() > 0


@pytest.mark.parametrize("arch", ARCHS)
def test_tiny_bases_speak(arch: str, tiny_base: TinyBase) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_base(arch))
    text = "Grüße, 42 times!\n"
    ids = tokenizer(text, return_tensors="pt").input_ids
    assert tokenizer.decode(ids[0]) == text
    assert "<|im_start|>assistant" in tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], add_generation_prompt=True, tokenize=False
    )
    model = AutoModelForCausalLM.from_pretrained(tiny_base(arch))
    with torch.no_grad():
        logits = model(ids).logits
    assert logits.std() > 0.5, "too flat: greedy tokens would depend on rounding"
    answer = model.generate(ids, do_sample=False, max_new_tokens=16, min_new_tokens=16)
    distinct = answer[0, ids.shape[1] :].unique().numel()
    assert distinct >= 6, "repeats itself: a wrong adapter would go unnoticed"


def test_old_gpt2_names_without_prefix_are_mapped(tiny_base: TinyBase, tmp_path: Path) -> None:
    new = tiny_base("gpt2")
    shutil.copy(new / "config.json", tmp_path)
    tensors = load_file(new / "model.safetensors")
    old = {k.removeprefix("transformer."): v for k, v in tensors.items()}
    old["h.0.attn.bias"] = torch.ones(1, 1, 8, 8)  # the causal mask that old files carry
    save_file(old, tmp_path / "model.safetensors")
    reference, mapped = Checkpoint(new), Checkpoint(tmp_path)
    module = "transformer.h.0.attn.c_attn"
    assert mapped.linears() == reference.linears()
    assert torch.equal(mapped.weight(module), reference.weight(module))
    assert mapped.bias(module) is not None
    assert mapped.tensor_name(module) == "h.0.attn.c_attn.weight"


def test_layers_come_in_numeric_order(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    tensors = {f"model.layers.{i}.mlp.up_proj.weight": torch.ones(3, 2) for i in range(12)}
    tensors["model.embed_tokens.weight"] = torch.ones(3, 2)
    save_file(tensors, tmp_path / "model.safetensors")
    order = [int(m.split(".")[2]) for m in Checkpoint(tmp_path).linears()]
    assert order == list(range(12))


def test_a_weight_is_a_copy(tiny_base: TinyBase) -> None:
    checkpoint = Checkpoint(tiny_base("llama"))
    name = checkpoint.linears()[0]
    before = checkpoint.weight(name)
    checkpoint.weight(name).zero_()
    assert torch.equal(checkpoint.weight(name), before)


def _sharded(source: Path, target: Path) -> None:
    tensors = load_file(source / "model.safetensors")
    shutil.copy(source / "config.json", target)
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for shard, held in parts.items():
        save_file({n: tensors[n] for n in held}, target / shard)
    weight_map = {n: shard for shard, held in parts.items() for n in held}
    (target / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_shards_read_as_one(tiny_base: TinyBase, tmp_path: Path) -> None:
    _sharded(tiny_base("llama"), tmp_path)
    whole, split = Checkpoint(tiny_base("llama")), Checkpoint(tmp_path)
    assert whole.linears() == split.linears()
    assert all(torch.equal(whole.weight(m), split.weight(m)) for m in whole.linears())
    assert set(split.shards()) == {"a.safetensors", "b.safetensors"}


def test_every_fault_is_listed(tiny_base: TinyBase, tmp_path: Path) -> None:
    _sharded(tiny_base("llama"), tmp_path)
    (tmp_path / "a.safetensors").unlink()
    damaged = tmp_path / "b.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-7])
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(BaseModelError) as caught:
        Checkpoint(tmp_path)
    text = "\n".join(caught.value.problems)
    assert len(caught.value.problems) == 3
    assert "a.safetensors is missing" in text and "b.safetensors is truncated" in text


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"pytorch_model.bin": "x"}, "only as pickle"),
        ({}, "neither model.safetensors nor"),
        ({"model.safetensors": ""}, "truncated or damaged"),
        ({"model.safetensors.index.json": "[]"}, "not a JSON object"),
        ({"model.safetensors.index.json": '{"weight_map": {"x": "../o.safetensors"}}'}, "names"),
    ],
)
def test_unusable_folders(files: dict[str, str], expected: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(BaseModelError, match=expected):
        Checkpoint(tmp_path)


def test_index_that_promises_too_much(tiny_base: TinyBase, tmp_path: Path) -> None:
    _sharded(tiny_base("llama"), tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.layers.9.ghost.weight"] = "a.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(BaseModelError, match="lacks 1 tensors, first model.layers.9.ghost"):
        Checkpoint(tmp_path)


def test_unknown_and_quantised_modules(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    name = "model.layers.0.mlp.up_proj"
    packed = torch.ones(4, 4, dtype=torch.uint8)
    save_file({f"{name}.weight": packed}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    with pytest.raises(BaseModelError, match="quantised"):
        checkpoint.weight(name)
    with pytest.raises(BaseModelError, match="no linear 'lm_head'"):
        checkpoint.shape("lm_head")
