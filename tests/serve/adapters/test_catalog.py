"""Proves that ``secura-serve`` reports every unusable adapter by name, and never serves it.

Needs no vLLM: everything here happens before the engine starts (``--check``, ``--strict``).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from secura_serve import adapter as adapters
from secura_serve.adapter.limits import LARGEST_RMS
from secura_serve.checkpoint import Checkpoint
from secura_serve.errors import AdapterFormatError, ConfigError, UnservableError
from secura_serve.method import MagNorm
from secura_serve.serve import basis as bases
from secura_serve.serve.app import memory
from secura_serve.serve.app.adapters.content.catalog import scan
from secura_serve.serve.app.main import main
from tests.support.engines import random_adapter


@pytest.fixture(scope="module")
def base(tiny_base):
    return tiny_base("llama")


@pytest.fixture
def folder(base, tmp_path):
    random_adapter(base, tmp_path / "good", r=4, seed=1)
    return tmp_path


def _edit(path, **keys):
    file = path / "adapter_config.json"
    raw = json.loads(file.read_text()) | keys
    file.write_text(json.dumps(raw))


def _damage(kind, folder, base, tiny_base):
    bad = folder / ("base" if kind == "base's name" else "bad")
    shutil.copytree(folder / "good", bad)
    weights = bad / "adapter_model.safetensors"
    if kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:-7])
    elif kind == "nan":
        tensors = load_file(weights)
        next(t for k, t in tensors.items() if k.endswith("secura_U"))[0, 0] = torch.nan
        save_file(tensors, weights)
    elif kind == "overflows":
        # Finite, and yet it poisoned the cache that all requests share.
        tensors = load_file(weights)
        save_file(
            {k: t * 1e30 if t.is_floating_point() else t for k, t in tensors.items()}, weights
        )
        _edit(bad, weights_digest=adapters.weights_digest(weights.read_bytes()))
    elif kind == "mixture":
        random_adapter(base, folder / "other", r=4, seed=2)
        shutil.copy(folder / "other" / weights.name, weights)
        shutil.rmtree(folder / "other")
    elif kind == "unknown format":
        _edit(bad, format_version=99)
    elif kind == "plain LoRA":
        _edit(bad, peft_type="LORA")
    elif kind == "pickle":
        weights.rename(bad / "adapter_model.bin")
    elif kind == "wrong base":
        shutil.rmtree(bad)
        random_adapter(tiny_base("mistral"), bad, r=4, seed=1)
    elif kind == "S-MagNorm":
        _edit(bad, magnorm={"mode": "activation", "scale": 6.0, "eps": 1e-8})
    elif kind == "bad name":
        bad.rename(folder / "b d")
    elif kind == "two lines":
        bad.rename(folder / "b\nd")


KINDS = {
    "truncated": "truncated or damaged",
    "nan": "NaN or Inf",
    "overflows": "no useful adapter",
    "mixture": "is not the file that adapter_config.json was written with",
    "unknown format": "format_version is 99",
    "plain LoRA": "is not part of a LoRA of linears",
    "pickle": "pickles are refused",
    "wrong base": "trained on another base",
    "S-MagNorm": "acts on activations",
    "bad name": "is not allowed",
    "two lines": "is not allowed",
    "base's name": "is the base model's name",
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_unusable_adapter_is_named_and_skipped(kind, folder, base, tiny_base, capsys):
    _damage(kind, folder, base, tiny_base)
    flags = ["--base", str(base), "--adapters", str(folder), "--served-model-name", "base"]
    assert main([*flags, "--check"]) == 1
    printed = capsys.readouterr().out
    names = {"bad name": "b d", "two lines": r"'b\nd'", "base's name": "base"}
    name = names.get(kind, "bad")
    assert f"{name} is not served: " in printed and KINDS[kind] in printed
    assert "1 servable" in printed
    assert main([*flags, "--strict"]) == 1
    assert name in capsys.readouterr().err


def test_check_passes_a_good_folder(folder, base, capsys):
    assert main(["--base", str(base), "--adapters", str(folder), "--check"]) == 0
    assert "1 servable" in capsys.readouterr().out


def test_each_adapter_of_another_base_is_called_by_its_own_name(base, tiny_base, tmp_path, capsys):
    for name in ("one", "two"):
        random_adapter(tiny_base("mistral"), tmp_path / name, r=4, seed=1)
    assert main(["--base", str(base), "--adapters", str(tmp_path), "--check"]) == 1
    printed = capsys.readouterr().out
    for name in ("one", "two"):
        assert f"{name} is not served: {name} was trained on another base" in printed


def test_an_s_magnorm_adapter_is_to_be_folded(folder, base, capsys):
    random_adapter(base, folder / "bounded", r=4, seed=2, magnorm=MagNorm("bounded"))
    flags = ["--base", str(base), "--adapters", str(folder)]
    assert main([*flags, "--check"]) == 0
    printed = capsys.readouterr().out
    assert "ok (bounded)" in printed and "2 servable" in printed and "1 of them full" in printed
    assert main([*flags, "--fold", "bouded"]) == 2
    told = capsys.readouterr().err
    assert "no such adapter; there are bounded, good; did you mean 'bounded'?" in told


def test_one_adapter_instead_of_a_folder_of_them(folder, base):
    with pytest.raises(ConfigError, match="this is one adapter"):
        scan(folder / "good", Checkpoint(base))


def test_basis_is_the_union_and_nested_ranks_add_nothing(base, tmp_path):
    wide = adapters.load(random_adapter(base, tmp_path / "wide", r=8, seed=1))
    narrow = adapters.load(random_adapter(base, tmp_path / "narrow", r=4, seed=2))
    other = adapters.load(random_adapter(base, tmp_path / "o", r=4, seed=3, rule="lowest_norm"))
    checkpoint = Checkpoint(base)
    norm_bounds = {
        bases.base_id(a): adapters.compare_with_base(a, checkpoint).norm_bounds
        for a in (wide, narrow, other)
    }
    assert bases.SharedBasis.of([narrow, wide], norm_bounds).width == 8
    union = bases.SharedBasis.of([narrow, wide, other], norm_bounds)
    assert 8 < union.width <= 12
    saved = bases.SharedBasis.load(union.save(tmp_path / "cache"))
    assert saved.verified == union.verified == norm_bounds
    for found in (wide, narrow, other):
        for module, cur in found.modules.items():
            W, place = checkpoint.weight(module).double(), saved.modules[module]
            U = saved.to_shared_basis(module, cur).double()
            got = W[:, place.cols[: U.shape[0]]] @ U @ W[place.rows[: U.shape[1]]]
            want = W[:, cur.cols.long()] @ cur.U.double() @ W[cur.rows.long()]
            torch.testing.assert_close(got, want)
    with pytest.raises(UnservableError, match="does not keep"):
        bases.SharedBasis.of([narrow], norm_bounds).to_shared_basis(module, other.modules[module])


def test_a_damaged_basis_file_is_refused(tmp_path):
    (tmp_path / "basis.json").write_text('{"modules": {')
    with pytest.raises(AdapterFormatError, match="cannot be read"):
        bases.SharedBasis.load(tmp_path / "basis.json")


def _lora(folder, base, **config):
    """A plain LoRA of rank 2 on one linear, as PEFT lays it out."""
    module, folder = "model.layers.0.self_attn.q_proj", folder / "lora"
    out, into = Checkpoint(base).shape(module)
    folder.mkdir()
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": "q"} | config)
    )
    stem = f"base_model.model.{module}.lora_"
    return folder, {f"{stem}A.weight": torch.ones(2, into), f"{stem}B.weight": torch.ones(out, 2)}


def test_a_plain_lora_is_served_beside_ours(folder, base):
    path, tensors = _lora(folder, base)
    save_file(tensors, path / "adapter_model.safetensors")
    catalog = scan(folder, Checkpoint(base))
    assert [lora.name for lora in catalog.plain_loras] == ["lora"]
    assert [a.name for a in catalog.served] == [a.name for a in catalog.foldable] == ["good"]
    assert catalog.plain_loras[0].r == 2 and "ok (plain LoRA)" in catalog.table()


LORA_FAULTS = {
    "a LoRA with use_dora is not served": lambda t: None,
    "B·A is": lambda t: t.update({k: torch.ones(2, 3) for k in t if "_A" in k}),
    "NaN or Inf": lambda t: next(iter(t.values())).fill_(torch.nan),
    "would overflow": lambda t: next(iter(t.values())).fill_(1e30),
    "map module names to, numbers": lambda t: None,
    "lora_A and lora_B must both be there": lambda t: t.popitem(),
    "the base has no such linear": lambda t: t.update(
        {k.replace("layers.0", "layers.99"): t.pop(k) for k in list(t)}
    ),
    "truncated or damaged": lambda t: None,
    "is missing; pickles": None,
    "rank 2, but adapter_config.json says 4": lambda t: None,
    "r must be, and rank_pattern map": lambda t: None,
    "module names to, whole numbers": lambda t: None,
    "whole numbers >= 1": lambda t: None,
}


@pytest.mark.parametrize(("rslora", "served"), [(False, 1), (True, 0)])
def test_the_bound_of_a_plain_lora_knows_its_scale(rslora, served, folder, base):
    # Each entry of B·A is 2: times alpha / 2 it is allowed, times alpha / √2 it is not.
    path, tensors = _lora(folder, base, lora_alpha=0.8 * LARGEST_RMS, use_rslora=rslora)
    save_file(tensors, path / "adapter_model.safetensors")
    assert len(scan(folder, Checkpoint(base)).plain_loras) == served


@pytest.mark.parametrize("reason", LORA_FAULTS)
def test_a_plain_lora_that_cannot_be_served_is_named(reason, folder, base):
    config = {
        "a LoRA with use_dora is not served": {"use_dora": True},
        "rank 2, but adapter_config.json says 4": {"rank_pattern": {"q_proj": 4}},
        "r must be, and rank_pattern map": {"r": 0},
        "module names to, whole numbers": {"rank_pattern": {"(": 2}},
        "whole numbers >= 1": {"rank_pattern": [2]},
        "map module names to, numbers": {"lora_alpha": "16"},
    }
    path, tensors = _lora(folder, base, **config.get(reason, {}))
    if (damage := LORA_FAULTS[reason]) is not None:
        damage(tensors)
        save_file(tensors, file := path / "adapter_model.safetensors")
        if reason == "truncated or damaged":
            file.write_bytes(file.read_bytes()[:-3])
    catalog = scan(folder, Checkpoint(base))
    (refused,) = catalog.refused
    assert refused.name == "lora" and reason in str(refused.error)


def test_a_quantised_base_is_refused_with_the_reason(folder, base, tmp_path_factory):
    packed = tmp_path_factory.mktemp("packed") / "base"
    shutil.copytree(base, packed)
    config = json.loads((packed / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "compressed-tensors"}
    (packed / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnservableError, match="compressed-tensors.*dense checkpoint"):
        scan(folder, Checkpoint(packed))
    assert main(["--base", str(packed), "--adapters", str(folder), "--check"]) == 1


def test_a_catalog_keeps_no_weights_and_one_basis_for_all(folder, base):
    random_adapter(base, folder / "other", r=4, seed=1)
    random_adapter(base, folder / "wider", r=6, seed=1)
    found = scan(folder, Checkpoint(base))
    good, other, wider = found.served
    assert all(cur.U.is_meta for a in (good, other, wider) for cur in a.modules.values())
    assert good.modules is other.modules and good.modules is not wider.modules
    full = adapters.load(folder / "wider")
    shared = bases.SharedBasis.of([good, other, wider], found.norm_bounds).modules
    for name, cur in full.modules.items():
        assert torch.equal(shared[name].rows, cur.basis.rows)
    assert bases.base_id(wider) == bases.base_id(full)


def test_a_lora_of_many_ranks_asks_for_room_for_the_largest_named(folder, base):
    path, tensors = _lora(folder, base, r=16, rank_pattern={"q_proj": 2})
    save_file(tensors, path / "adapter_model.safetensors")
    # vLLM refuses to start with less than what the config names.
    assert scan(folder, Checkpoint(base)).plain_loras[0].r == 16


def test_what_widens_the_basis_is_named(folder, base):
    random_adapter(base, folder / "other", r=4, seed=1, rule="lowest_norm")
    random_adapter(base, folder / "wider", r=6, seed=1)
    found = scan(folder, Checkpoint(base))
    served = found.served
    shared = bases.SharedBasis.of(served, found.norm_bounds)
    assert shared.off_basis(served) == ["other"] and shared.width > 6
    assert bases.SharedBasis.of(served[:1], found.norm_bounds).off_basis(served[:1]) == []


@pytest.mark.parametrize("fits, slots", [(3, 8), (200, 200), (10**6, 1000)])
def test_slots_take_at_most_a_twentieth_of_the_memory(fits, slots, monkeypatch):
    free = 16 * 2**30
    monkeypatch.setattr(memory, "available_memory", lambda: free)
    assert memory.default_cached(1000, free // 20 // fits) == slots


@pytest.mark.parametrize("hidden", ["", "adapter_config.json", "adapter_model.safetensors"])
def test_what_may_not_be_read_is_named_and_the_others_are_served(hidden, folder, base, monkeypatch):
    """The tests may run as root, who may read everything: so the system's answer is put in."""
    random_adapter(base, folder / "secret", r=4, seed=2)
    closed = folder / "secret" / hidden

    # A file that is closed can be looked at, what is in a closed folder cannot.
    def guarded(real):
        def call(self, *args, **options):
            if closed in (self if hidden else None, *self.parents):
                raise PermissionError(13, "Permission denied", str(self))
            return real(self, *args, **options)

        return call

    for method in ("open",) if hidden else ("open", "stat"):
        monkeypatch.setattr(Path, method, guarded(getattr(Path, method)))
    good, secret = scan(folder, Checkpoint(base)).entries
    assert good.name == "good" and good.error is None
    assert secret.name == "secret" and "Permission denied" in str(secret.error)
