"""Proves what a whole fine-tune may change to be served per request, and what it is refused for.

Needs torch and transformers; tiny random bases, no engine.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from secura_serve.checkpoint import Checkpoint
from secura_serve.errors import StorageError, UnservableError
from secura_serve.method import dequantise_rows
from secura_serve.serve.app.adapters.content.fine_tune import FineTune, is_fine_tune
from secura_serve.serve.app.adapters.content.images import DeltaImages
from secura_serve.serve.app.adapters.content.snapshots import SnapshotStore
from secura_serve.serve.app.adapters.content.verifier import Verifier
from secura_serve.serve.app.adapters.resident.slots import ResidentSlots, ResidentSpec
from secura_serve.serve.delta_image import DeltaImage
from tests.support.engines import random_adapter, random_fine_tune
from tests.support.lifecycle import house


@pytest.fixture(scope="module")
def base(tiny_base):
    return tiny_base("llama")


@pytest.fixture
def tuned(base, tmp_path):
    return random_fine_tune(base, tmp_path / "tuned", seed=1, only=("q_proj", "up_proj"))


def _verifier(base, root):
    store = SnapshotStore(root / "copies")
    images = DeltaImages(root / "deltas", base, "int8")
    return Verifier(lambda: Checkpoint(base), store, images=images), images


def _change(folder, **tensors):
    file = folder / "model.safetensors"
    save_file(load_file(file) | tensors, file, metadata={"format": "pt"})


def _set(folder, key, value):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))


@pytest.mark.parametrize("arch", ["llama", "qwen2", "gpt2"])
def test_its_image_is_what_it_changes(arch, tiny_base, tmp_path):
    base = tiny_base(arch)
    names = ("c_attn", "c_proj") if arch == "gpt2" else ("q_proj", "down_proj")
    folder = random_fine_tune(base, tmp_path / "tuned", seed=2, only=names)
    verifier, _ = _verifier(base, tmp_path)
    entry = verifier.examine(folder)
    image = DeltaImage.open(entry.snapshot.path)
    expected = [m for m in Checkpoint(base).linears() if m.endswith(names)]
    assert [*entry.fine_tune.modules] == [*image.modules] == expected
    for module, weight, scale in image.read(image.modules):
        D = Checkpoint(folder).weight(module).double() - Checkpoint(base).weight(module).double()
        step = D.abs().amax(1, keepdim=True) / 127
        assert ((dequantise_rows(weight, scale) - D).abs() <= step * 0.501 + 1e-7).all()
    assert entry.status == "ok (whole fine-tune)" and not entry.per_request


def test_unchanged_files_are_not_compared_again_and_others_make_another(base, tuned, tmp_path):
    verifier, images = _verifier(base, tmp_path)
    first = verifier.examine(tuned)
    assert verifier.examine(tuned).snapshot == first.snapshot
    _change(tuned, **{"model.layers.0.self_attn.q_proj.weight": torch.zeros(64, 64)[:1]})
    with pytest.raises(UnservableError, match="q_proj.weight is"):
        verifier.examine(tuned)
    shutil.rmtree(tuned)
    random_fine_tune(base, tuned, seed=5)
    second = verifier.examine(tuned)
    assert second.snapshot.path != first.snapshot.path
    assert len([p for p in images.root.iterdir() if p.is_dir()]) == 2


def test_other_types_of_equal_numbers_are_equal(base, tuned):
    tensors = load_file(tuned / "model.safetensors")
    norm = "model.norm.weight"
    _change(tuned, **{norm: tensors[norm].double()})
    assert FineTune.load(tuned, Checkpoint(base)).modules


def test_a_head_that_is_tied_may_be_there_or_not(tiny_base, tmp_path):
    base = tiny_base("gemma2")
    assert "lm_head.weight" not in load_file(base / "model.safetensors")
    tuned = random_fine_tune(base, tmp_path / "tuned", seed=1, only=("q_proj",))
    embedding = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    _change(tuned, **{"lm_head.weight": embedding.clone()})
    assert FineTune.load(tuned, Checkpoint(base)).modules
    _change(tuned, **{"lm_head.weight": embedding * 2})
    with pytest.raises(UnservableError, match=r"lm_head.weight differs"):
        FineTune.load(tuned, Checkpoint(base))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("model.embed_tokens.weight", "model.embed_tokens.weight differs from the base's"),
        ("model.layers.1.input_layernorm.weight", "layers.1.input_layernorm.weight differs"),
        ("model.norm.weight", "model.norm.weight differs"),
    ],
)
def test_what_requests_share_must_be_the_bases(name, said, base, tuned):
    tensors = load_file(tuned / "model.safetensors")
    _change(tuned, **{name: tensors[name] + 0.1})
    with pytest.raises(UnservableError, match=said):
        FineTune.load(tuned, Checkpoint(base))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rope_parameters", {"rope_theta": 5e5, "rope_type": "default"}),
        ("hidden_act", "gelu"),
        ("rms_norm_eps", 1e-3),
    ],
)
def test_another_configuration_is_another_model(key, value, base, tuned):
    _set(tuned, key, value)
    with pytest.raises(UnservableError, match="its config.json has"):
        FineTune.load(tuned, Checkpoint(base))
    _set(tuned, key, Checkpoint(base).config.get(key))


def test_what_changes_no_output_may_differ(base, tuned):
    for key, value in (("use_cache", False), ("torch_dtype", "bfloat16"), ("eos_token_id", 7)):
        _set(tuned, key, value)
    assert FineTune.load(tuned, Checkpoint(base)).modules


def test_other_faults_are_told(base, tuned, tmp_path):
    with pytest.raises(UnservableError, match="does not differ from"):
        FineTune.load(base, Checkpoint(base))
    name = "model.layers.0.self_attn.q_proj.weight"
    _change(tuned, **{name: torch.full_like(load_file(base / "model.safetensors")[name], 1e999)})
    with pytest.raises(UnservableError, match="NaN or Inf"):
        FineTune.load(tuned, Checkpoint(base))
    for dtype, size in ((torch.bfloat16, 1e38), (torch.float64, 1e300), (torch.float32, 2e2)):
        W = load_file(base / "model.safetensors")[name]
        _change(tuned, **{name: torch.full(W.shape, size, dtype=dtype)})
        with pytest.raises(UnservableError, match="would overflow in the engine"):
            FineTune.load(tuned, Checkpoint(base))
    _change(tuned, **{name: torch.zeros(W.shape, dtype=torch.float8_e4m3fn)})
    with pytest.raises(UnservableError, match="only floats of 16 bits or more"):
        FineTune.load(tuned, Checkpoint(base))
    _change(tuned, **{name: W * 1.5})
    _change(tuned, extra=torch.ones(1))
    with pytest.raises(UnservableError, match="extra: .* has no such tensor"):
        FineTune.load(tuned, Checkpoint(base))
    file = tuned / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UnservableError, match="truncated or damaged"):
        FineTune.load(tuned, Checkpoint(base))


def test_what_is_and_is_not_a_fine_tune(base, tuned, tmp_path):
    assert is_fine_tune(tuned)
    adapter = random_adapter(base, tmp_path / "a", r=2, seed=1)
    assert not is_fine_tune(adapter)
    shutil.copy(base / "config.json", adapter)
    assert not is_fine_tune(adapter)
    assert not is_fine_tune(tmp_path)


def test_without_a_place_it_is_refused_and_with_one_it_is_asked(base, tmp_path):
    parts = house(tmp_path, base)
    random_fine_tune(base, parts.folder / "tuned", seed=1, only=("q_proj",))
    verifier, images = _verifier(base, tmp_path)
    parts.updates.verifier = verifier
    parts.updates.fill([verifier.examine(parts.folder / "tuned")])
    assert parts.library.find("tuned") is None
    assert "no place for the linears" in parts.library.records["tuned"].refused
    spec = ResidentSpec(1, "int8", tuple(Checkpoint(base).linears()))
    parts.updates.residency.places = ResidentSlots(spec, images)
    parts.updates.fill([verifier.examine(parts.folder / "tuned")])
    version = parts.library.find("tuned")
    assert version.per_request and not version.foldable
    assert version.engine_path == version.snapshot.path


HOSTILE = {
    "dtype": "nosuch",
    "num_attention_heads": 0,
    "hidden_size": "x",
    "rope_scaling": "x",
    "layer_types": 5,
    "id2label": [1],
    "model_type": ["llama"],
}


@pytest.mark.parametrize("key", list(HOSTILE))
def test_a_configuration_that_libraries_choke_on_is_a_refusal(key, base, tuned):
    _set(tuned, key, HOSTILE[key])
    with pytest.raises(UnservableError):
        FineTune.load(tuned, Checkpoint(base))


def test_brackets_without_end_are_a_refusal(base, tuned):
    (tuned / "config.json").write_text("[" * 200_000)
    with pytest.raises(UnservableError):
        FineTune.load(tuned, Checkpoint(base))


def _sharded(folder, index):
    (folder / "model.safetensors").rename(folder / "w.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_a_pipe_in_the_place_of_a_shard_is_refused_and_not_opened(base, tuned, tmp_path):
    _sharded(tuned, {"weight_map": {"a": "w.safetensors"}})
    (tuned / "w.safetensors").unlink()
    os.mkfifo(tuned / "w.safetensors")
    (tuned / "model1.safetensors").write_bytes(b"decoy")
    for verifier in (_verifier(base, tmp_path)[0], Verifier(lambda: Checkpoint(base))):
        with pytest.raises(UnservableError, match="regular files"):
            verifier.examine(tuned)


def test_the_shards_that_an_index_names_are_the_content(base, tuned, tmp_path):
    names = load_file(tuned / "model.safetensors")
    _sharded(tuned, {"weight_map": dict.fromkeys(names, "w.safetensors")})
    (tuned / "model1.safetensors").write_bytes(b"decoy")
    verifier, _ = _verifier(base, tmp_path)
    first = verifier.examine(tuned)
    tensors = load_file(tuned / "w.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    save_file(tensors | {name: tensors[name] * 1.5}, tuned / "w.safetensors")
    assert verifier.examine(tuned).snapshot.path != first.snapshot.path


def test_a_file_that_shrinks_while_it_is_read_is_a_refusal(base, tuned, monkeypatch):
    compared = torch.equal

    def shrinking(*args):
        os.truncate(tuned / "model.safetensors", 4000)
        return compared(*args)

    monkeypatch.setattr(torch, "equal", shrinking)
    with pytest.raises(UnservableError, match="ends early"):
        FineTune.load(tuned, Checkpoint(base))


def test_a_damaged_image_is_never_served(base, tuned, tmp_path):
    verifier, images = _verifier(base, tmp_path)
    folder = verifier.examine(tuned).snapshot.path
    file = folder / "delta.safetensors"
    content = bytearray(file.read_bytes())
    content[-9] ^= 1
    file.write_bytes(content)
    with pytest.raises(StorageError, match="its bytes have changed"):
        asyncio.run(DeltaImages(images.root, base, "int8").make(folder, [str(folder)]))


@pytest.mark.long
def test_a_lost_image_is_made_again_from_the_checkpoint_by_a_reload(base, tmp_path):
    parts = house(tmp_path, base)
    random_fine_tune(base, parts.folder / "tuned", seed=1, only=("q_proj",))
    verifier, images = _verifier(base, tmp_path)
    parts.updates.verifier = verifier
    spec = ResidentSpec(1, "int8", tuple(Checkpoint(base).linears()))
    parts.updates.residency.places = ResidentSlots(spec, images)
    parts.updates.fill([verifier.examine(parts.folder / "tuned")])
    version = parts.library.find("tuned")

    async def damage_and_reload(damage):
        damage()
        with pytest.raises(StorageError, match="/v1/adapters/reload makes it again"):
            await images.make(version.image, [str(version.image)])
        await parts.watch.sync("tuned")
        assert (await images.make(version.image, ["/nowhere"])).folder == version.image
        assert parts.library.find("tuned") is version

    for damage in (
        lambda: os.truncate(version.image / "delta.safetensors", 4096),
        lambda: shutil.rmtree(version.image),
    ):
        asyncio.run(damage_and_reload(damage))
