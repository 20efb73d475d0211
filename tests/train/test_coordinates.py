"""Proves natural coordinates: the maths against an independent square root, the moments against a
plain loop in float64, the tuner's gradients against those of U itself, folders and resuming.

Needs peft and transformers; tiny random models.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from secura_serve import adapter
from secura_serve.errors import ConfigError
from secura_serve.method import Coordinates, natural_coordinates
from secura_serve.train import adapter_layers
from secura_serve.train.basis.energies import weight_of
from secura_serve.train.coordinates import Moments, measure_moments
from secura_serve.train.coordinates.kept import encode_moments, read_moments
from secura_serve.train.data import BaseText, sample_base_text
from secura_serve.train.loop.fit import Interrupted
from secura_serve.train.main import main
from secura_serve.train.main import settings as parsed
from secura_serve.train.methods import prepare, restore
from secura_serve.train.methods.prepared import PreparedModel
from secura_serve.train.methods.tensors import checkpoint_tensors
from secura_serve.train.output.checkpoints import RunFolder
from secura_serve.train.run import train
from secura_serve.train.settings import TrainConfig
from tests.support.training import PAIRS, flags, same, write
from tests.support.tuning import SHAPES, TOKENS, R, base, logits, shake, tuned

TinyBase = Callable[[str], Path]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write(tmp_path / "sums.jsonl", PAIRS)


def covariance(size: int, seed: int) -> torch.Tensor:
    half = torch.randn(size, 3 * size, generator=torch.Generator().manual_seed(seed)).double()
    half[0] *= 30
    return half @ half.T


def test_every_direction_costs_the_same() -> None:
    """½·‖Σ_g^½·L·Û·P·Σ_x^½‖² is the same for every Û of unit norm."""
    draw = torch.Generator().manual_seed(0)
    C, W_rows = (torch.randn(*shape, generator=draw) for shape in ((20, 6), (6, 30)))
    gradients, inputs = covariance(6, 1), covariance(6, 2)
    left, right = natural_coordinates(C, W_rows, gradients, inputs, damping=1e-9)
    roots = [torch.linalg.cholesky(m) for m in (gradients, inputs)]
    costs = []
    for _ in range(8):
        core = torch.randn(6, 6, generator=draw).double()
        update = left.double() @ (core / core.norm()) @ right.double()
        costs.append(float((roots[0].T @ update @ roots[1]).norm()))
    assert max(costs) / min(costs) == pytest.approx(1, rel=1e-4)
    for factor, plain in ((C @ left, C), (right @ W_rows, W_rows)):
        assert float(factor.norm()) == pytest.approx(float(plain.norm()), rel=1e-5)
    assert left.dtype == right.dtype == torch.float32


def test_damping_bounds_what_counts_as_quiet() -> None:
    C, W_rows = torch.eye(4), torch.eye(4)
    quiet = torch.diag(torch.tensor([1.0, 1.0, 1.0, 1e-12]))
    _, right = natural_coordinates(C, W_rows, quiet, quiet, damping=0.01)
    values = right.diagonal()
    assert float(values[3] / values[0]) == pytest.approx((1.0075 / 0.0075) ** 0.5, rel=1e-4)
    for wrong in (torch.zeros(4, 4), torch.full((4, 4), torch.nan)):
        with pytest.raises(ConfigError, match="zero or not finite"):
            natural_coordinates(C, W_rows, quiet, wrong, damping=0.01)


@pytest.mark.parametrize("arch", list(SHAPES))
def test_moments_are_those_of_rows_and_of_gradients(arch: str) -> None:
    """Against one sequence at a time on a second model, with W x made from each layer's input."""
    model = tuned(base(arch))
    layers = adapter_layers(model, "default")
    text = BaseText(TOKENS, 2)
    with model.disable_adapter():
        found = measure_moments(model.get_base_model(), text, layers, "default")
    assert all(p.grad is None for p in model.parameters())
    plain = base(arch).requires_grad_(True)
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in layers}
    for name in layers:
        plain.get_submodule(name).register_forward_hook(
            lambda _, x, y, name=name: (y.retain_grad(), seen[name].extend((x[0], y)))[0]
        )
    wanted = {name: [torch.zeros(R, R).double() for _ in range(2)] for name in layers}
    for row in TOKENS:
        for values in seen.values():
            values.clear()
        scores = plain(row[None]).logits[0, 1:-1]
        F.cross_entropy(scores, row[2:], reduction="sum").backward()
        for name, layer in layers.items():
            basis, W = layer.basis("default"), weight_of(plain.get_submodule(name))
            x, y = seen[name]
            z = x[0] @ W[basis.rows].T
            g = y.grad[0] @ W[:, basis.cols]
            wanted[name][0] += z.T @ z
            wanted[name][1] += g.T @ g
    for name, moments in found.items():
        torch.testing.assert_close(moments.inputs, wanted[name][0].detach(), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(moments.gradients, wanted[name][1], rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("core", ["u", "ab"])
@pytest.mark.parametrize("norm", [None, {"mode": "bounded", "tau": 0.1}])
def test_the_gradient_is_autograds_and_the_folder_holds_the_product(
    core: str, norm: dict[str, object] | None, tmp_path: Path
) -> None:
    model = tuned(base(), core=core, magnorm=norm)
    draw = torch.Generator().manual_seed(5)
    pairs = {}
    for module, layer in adapter_layers(model, "default").items():
        for values in (layer.secura_U, layer.secura_B):
            if "default" in values:
                values["default"].data.zero_()
        pairs[module] = Coordinates(*(torch.randn(R, R, generator=draw) for _ in range(2)))
        layer.set_coordinates("default", pairs[module])
    torch.testing.assert_close(logits(model), logits(base()), rtol=0, atol=1e-12)
    shake(model)
    model(TOKENS).logits.square().sum().backward()
    oracle = tuned(base(), core="u", magnorm=norm, alpha=1.0)
    for module, layer in adapter_layers(oracle, "default").items():
        theirs = adapter_layers(model, "default")[module]
        layer.secura_U["default"].data.copy_(theirs.core("default").detach())
    torch.testing.assert_close(logits(oracle), logits(model), rtol=1e-6, atol=1e-8)
    oracle(TOKENS).logits.square().sum().backward()
    for module, layer in adapter_layers(model, "default").items():
        product = adapter_layers(oracle, "default")[module].secura_U["default"].grad.double()
        left, right = (part.double() for part in pairs[module])
        grad = layer.secura_alpha["default"] * left.T @ product @ right.T
        if core == "ab":
            A, B = layer.secura_A["default"], layer.secura_B["default"]
            got, wanted = B.grad, A.detach().double().T @ grad
        else:
            got, wanted = layer.secura_U["default"].grad, grad
        torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-6)
    model.save_pretrained(tmp_path / "natural")
    assert adapter.load(tmp_path / "natural").modules.keys() == pairs.keys()
    loaded = PeftModel.from_pretrained(base(), tmp_path / "natural")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-6, atol=1e-7)
    again = PeftModel.from_pretrained(base(), tmp_path / "natural", is_trainable=True)
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-6, atol=1e-7)
    with pytest.raises(ConfigError, match="has been trained"):
        layer.set_coordinates("default", pairs[module])
    model.delete_adapter("default")
    assert not layer.secura_left and not layer.secura_right


def config(base: Path, data: Path, out: Path, **more: object) -> TrainConfig:
    settings = {"rank": 8, "device": "cpu", "dtype": "float32", "coordinates": "natural"} | more
    return TrainConfig(base=str(base), data=str(data), out=str(out), **settings)


def test_a_checkpoint_holds_them_and_a_cache_keeps_the_moments(
    tiny_base: TinyBase, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(tiny_base("llama"), data, tmp_path / "o")
    first = prepare(settings)
    kept = checkpoint_tensors(first.model)
    assert any(".secura_left." in name for name in kept)
    measured: list[int] = []
    monkeypatch.setattr(
        "secura_serve.train.coordinates.natural.measure_moments", lambda *_: measured.append(1)
    )
    second = prepare(settings)
    assert not measured
    tensors = {name: value.clone() for name, value in kept.items()}
    for name, value in checkpoint_tensors(second.model).items():
        assert torch.equal(value, tensors[name]), name

    def closed(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    # A cache that others have filled and that this user may read.
    monkeypatch.setattr("secura_serve.train.coordinates.natural.only_writer", closed)
    prepare(settings)
    assert not measured
    plain = prepare(config(tiny_base("llama"), data, tmp_path / "o", coordinates="plain"))
    restore(plain.model, tensors)
    assert torch.equal(checkpoint_tensors(plain.model)[name], tensors[name])


@pytest.mark.parametrize("fails", ["only_writer", "write_whole"])
def test_a_cache_that_cannot_be_written_costs_one_measurement(
    fails: str, tiny_base: TinyBase, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    def measure(_: object, __: object, layers: Any, ___: object) -> dict[str, Moments]:
        measured.append(1)
        return {module: Moments(covariance(8, 1), covariance(8, 2)) for module in layers}

    measured: list[int] = []
    natural = "secura_serve.train.coordinates.natural"
    monkeypatch.setattr(f"{natural}.measure_moments", measure)
    monkeypatch.setattr(f"{natural}.{fails}", full)
    monkeypatch.setenv("SECURA_CACHE", str(tmp_path / "cache"))
    prepare(config(tiny_base("llama"), data, tmp_path / "o"))
    assert len(measured) == 1


def prepared(base: Path | str, data: Path, out: Path, **more: Any) -> PreparedModel:
    """A model with the adapter ``default``, in plain coordinates unless ``more`` says otherwise."""
    return prepare(config(base, data, out, **{"coordinates": "plain"} | more))


def test_a_file_of_moments_serves_its_base_and_basis_and_smaller_ranks(
    tiny_base: TinyBase, data: Path, tmp_path: Path
) -> None:
    base, out, file = tiny_base("llama"), tmp_path / "o", tmp_path / "moments"
    layers = adapter_layers(prepared(base, data, out).model, "default")
    moments = {
        module: Moments(covariance(8, number).float(), covariance(8, number + 500).float())
        for number, module in enumerate(layers)
    }
    file.write_bytes(encode_moments(moments, layers, "default"))

    def read(base: Path | str = base, **more: Any) -> dict[str, Moments] | None:
        model = prepared(base, data, out, **more).model
        return read_moments(file, adapter_layers(model, "default"), "default")

    for rank in (8, 5):
        found = read(rank=rank, dtype="bfloat16")
        assert found is not None and found.keys() == moments.keys()
        for module, sums in found.items():
            assert torch.equal(sums.inputs, moments[module].inputs[:rank, :rank].double())
            assert torch.equal(sums.gradients, moments[module].gradients[:rank, :rank].double())
    assert read(targets="q_proj,down_proj") is not None
    assert read(rank=9) is None and read(selection_seed=1) is None
    assert read(tiny_base("qwen2")) is None
    whole = file.read_bytes()
    for damaged in (
        whole[: len(whole) // 2],
        whole[:4],
        b"",
        whole.replace(b"fingerprints", b"x" * 12),
    ):
        file.write_bytes(damaged)
        assert read() is None
    module = next(iter(layers))
    for part, value in (
        ("inputs", torch.full((8, 8), torch.nan)),
        ("gradients", torch.full((8, 8), torch.inf)),
        ("inputs", torch.ones(1, 1)),
        ("gradients", torch.ones(8)),
        ("inputs", torch.ones(())),
        ("rows", torch.tensor(3)),
    ):
        file.write_bytes(whole)
        tensors = load_file(file) | {f"{module}.{part}": value}
        with safe_open(file, "pt") as opened:
            facts = opened.metadata()
        save_file(tensors, file, facts)
        assert read() is None
    for nonsense in ("[]", "7", "null", "{", "[" * 100_000):
        save_file(tensors, file, {"fingerprints": nonsense})
        assert read() is None
    file.unlink()
    assert read() is None


def test_another_base_of_the_same_shapes_has_other_moments(
    tiny_base: TinyBase, data: Path, tmp_path: Path
) -> None:
    first = prepared(tiny_base("llama"), data, tmp_path / "o")
    layers = adapter_layers(first.model, "default")
    moments = {module: Moments(covariance(8, 1), covariance(8, 2)) for module in layers}
    (tmp_path / "file").write_bytes(encode_moments(moments, layers, "default"))
    with torch.no_grad():
        layers["model.layers.1.mlp.up_proj"].pristine.mul_(1.5)
    assert read_moments(tmp_path / "file", layers, "default") is None


def test_those_of_the_embedded_base_are_shipped(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[int] = []
    monkeypatch.setattr(
        "secura_serve.train.coordinates.natural._measure", lambda *_: measured.append(1)
    )
    settings = TrainConfig(base="smollm2-135m", data=str(data), out=str(tmp_path / "o"))
    assert settings.coordinates == "natural" and settings.rank == 32
    model = prepare(settings).model
    assert not measured and len(adapter_layers(model, "default")) == 210
    assert any(".secura_left." in name for name in checkpoint_tensors(model))


def test_what_is_shipped_serves_no_other_base_of_that_name(
    tiny_base: TinyBase, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fine-tune with the same weights in the layers that are trained writes other text."""
    original, name = tiny_base("llama"), "smollm2-135m"
    layers = adapter_layers(prepared(original, data, tmp_path / "o").model, "default")
    wrong = {module: Moments(torch.eye(8), torch.eye(8)) for module in layers}
    (tmp_path / f"{name}.safetensors").write_bytes(encode_moments(wrong, layers, "default"))
    monkeypatch.setattr("secura_serve.train.coordinates.natural.SHIPPED", tmp_path)
    shutil.copytree(original, fine_tune := tmp_path / "mine" / name)
    weights = load_file(fine_tune / "model.safetensors")
    weights["model.norm.weight"] *= 1.5
    save_file(weights, fine_tune / "model.safetensors", {"format": "pt"})
    measured: list[int] = []

    def measure(*_: object) -> dict[str, Moments]:
        measured.append(1)
        return {module: Moments(covariance(8, 1), covariance(8, 2)) for module in layers}

    monkeypatch.setattr("secura_serve.train.coordinates.natural.measure_moments", measure)
    monkeypatch.setenv("SECURA_CACHE", str(tmp_path / "cache"))
    prepare(config(fine_tune, data, tmp_path / "o"))
    assert measured


def test_a_chat_template_may_begin_with_the_message(
    tiny_base: TinyBase, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECURA_CACHE", str(tmp_path / "cache"))
    shutil.copytree(tiny_base("llama"), base := tmp_path / "base")
    (base / "chat_template.jinja").write_text(
        "{% for message in messages %}{{ message.content }}{{ eos_token }}{% endfor %}"
    )
    model = prepare(config(base, data, tmp_path / "o"))
    assert any(".secura_left." in name for name in checkpoint_tensors(model.model))
    text = sample_base_text(model.model, model.tokenizer, sequences=2, length=3)
    assert text.start == 1 and (text.tokens[:, 0] == model.tokenizer.bos_token_id).all()


def test_natural_is_the_default_where_it_has_been_measured(data: Path, tmp_path: Path) -> None:
    def default(**more: Any) -> str | None:
        return TrainConfig(base="x", data=str(data), out=str(tmp_path / "o"), **more).coordinates

    assert default() == "natural"
    assert default(method="secura", core="u", magnorm="none") == "natural"
    for more in (
        {"method": "secura"},
        {"core": "ab"},
        {"magnorm": "bounded"},
        {"selection": "calibrated"},
    ):
        assert default(**more) == "plain"
    assert default(method="lora") == "plain" and default(coordinates="plain") == "plain"


def test_a_recipe_from_before_means_plain_coordinates(data: Path, tmp_path: Path) -> None:
    old = {"base": "x", "data": str(data), "out": "o", "method": "curlora"}
    assert TrainConfig.upgrade(old)["coordinates"] == "plain"
    for method, written, now in (
        ("curlora", {}, "plain"),
        ("curlora", {"coordinates": "natural"}, "natural"),
        ("lora", {"coordinates": "plain"}, "plain"),
    ):
        (file := tmp_path / "train.json").write_text(
            json.dumps({"config": old | {"method": method} | written})
        )
        assert parsed(["--config", str(file)]).coordinates == now
    (file := tmp_path / "recipe.yaml").write_text(json.dumps(old))
    assert parsed(["--config", str(file)]).coordinates == "natural"


def test_another_methods_recipe_takes_no_damping_along(data: Path, tmp_path: Path) -> None:
    settings = {"base": "x", "data": str(data), "out": "o", "method": "curlora", "damping": 0.1}
    (file := tmp_path / "train.json").write_text(
        json.dumps({"config": settings | {"coordinates": "natural"}})
    )
    assert parsed(["--config", str(file)]).damping == 0.1
    for method in ("secura", "lora", "full"):
        now = parsed(["--config", str(file), "--method", method])
        assert (now.coordinates, now.damping) == ("plain", 0.01)


@pytest.mark.parametrize("method", ["secura", "lora", "full"])
@pytest.mark.parametrize("written", [{}, {"coordinates": "plain"}])
def test_a_run_from_before_goes_on(
    method: str, written: dict[str, str], data: Path, tmp_path: Path
) -> None:
    """A method that trains as it did: with the same flags, its run is the same run."""
    now = TrainConfig(
        base="x", data=str(data), out=str(tmp_path / "o"), method=method, resume="auto"
    )
    folder = RunFolder(now)
    with folder.locked():
        folder.open({})
        facts = json.loads((folder.path / "run.json").read_text())
        del facts["coordinates"]
        (folder.path / "run.json").write_text(json.dumps(facts | written))
        folder._check_same_run(folder.path / "run.json", facts | {"coordinates": now.coordinates})


@pytest.mark.long
@pytest.mark.parametrize("more", [(), ("--method", "secura"), ("--retain", "1")])
def test_a_resumed_run_gives_the_same_bits(
    tiny_base: TinyBase, data: Path, tmp_path: Path, more: tuple[str, ...]
) -> None:
    small = ("--retain-sequences", "4", "--retain-length", "8") if "--retain" in more else ()
    natural = ("--coordinates", "natural", "--damping", "0.1", *more, *small)
    base, whole, parts = tiny_base("qwen2"), tmp_path / "whole", tmp_path / "parts"
    steps = ("--max-steps", "4", "--save-steps", "2")
    assert main(flags(base, data, whole, *natural, *steps)) == 0
    run_dir = tmp_path / "run"
    stopped = ("--run-dir", str(run_dir))

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
            if state.global_step == 2:
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted):
        train(parsed(flags(base, data, parts, *natural, *steps, *stopped)), callbacks=[Stop()])
    assert main(flags(base, data, parts, *natural, *steps, *stopped, "--resume", "auto")) == 0
    assert same(whole, parts)
    assert load_file(whole / "adapter_model.safetensors")


def test_the_setting_is_for_cur_methods_alone(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="coordinates: not supported by method lora"):
        config(tmp_path, tmp_path, tmp_path, method="lora")
    with pytest.raises(ConfigError, match="damping: needs --coordinates natural"):
        config(tmp_path, tmp_path, tmp_path, coordinates="plain", damping=0.1)


@pytest.mark.parametrize(
    "template, said",
    [
        ("{{ raise_exception('a system message is wanted') }}", "a system message is wanted"),
        ("{{ messages[0]['content'] }}", "no token that begins a text"),
    ],
)
def test_a_base_that_cannot_begin_a_text_is_told_what_to_do(
    tiny_base: TinyBase, data: Path, tmp_path: Path, template: str, said: str
) -> None:
    model = prepared(tiny_base("llama"), data, tmp_path / "o")
    model.tokenizer.chat_template = template
    model.tokenizer.bos_token = model.tokenizer.eos_token = None
    with pytest.raises(ConfigError, match=f"{said}.*--coordinates plain"):
        sample_base_text(model.model, model.tokenizer, sequences=1, length=1)
