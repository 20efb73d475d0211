"""Proves secura-merge: its weights equal a float64 oracle and, bit for bit, PEFT's merge through
our tuner, on every architecture, sharded or not; what is not touched stays as it was; every
refusal names its reason; an output is whole or absent, whenever the merge is killed or the disk
is full; a LoRA export gives stock PEFT the same logits.

Needs peft, transformers and the tiny bases of conftest.py; no server, no network.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from blake3 import blake3
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from secura_serve import adapter as A
from secura_serve.errors import MergeError
from secura_serve.merge import (
    FoldPlan,
    Part,
    Target,
    base_stamp,
    fold_stream,
    fold_weight,
    open_source,
    plan_fold,
    plan_merge,
    verify_base,
    write_merge,
)
from secura_serve.merge.main import main
from secura_serve.method import Basis, MagNorm, merged
from tests.support import warm
from tests.support.bases import ARCHS
from tests.support.merging import (
    NORMS,
    at_step,
    killed_at_every_step,
    make_adapter,
    oracle,
    reshard,
    tensors_of,
)

TinyBase = Callable[[str], Path]
TOKENS = torch.arange(3, 21)[None]
BOUNDED = MagNorm("bounded", tau=0.05)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model.eval()(TOKENS).logits
    return found


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def peft_merged(base: Path, adapter: Path, dtype: torch.dtype) -> Any:
    from peft import PeftModel

    import secura_serve.train.tuner.model  # noqa: F401 - registers the PEFT method

    return PeftModel.from_pretrained(load(base, dtype), adapter).merge_and_unload()


def complaint(*flags: str, capsys: Any, status: int = 1) -> str:
    """What a refused command says."""
    assert main(flags) == status
    said: str = capsys.readouterr().err
    return said


@pytest.fixture
def llama(tiny_base: TinyBase) -> Path:
    return tiny_base("llama")


@pytest.mark.long
@pytest.mark.parametrize("norm", NORMS, ids=lambda n: n.mode)
@pytest.mark.parametrize("arch", ARCHS)
def test_agrees_with_float64(arch: str, norm: MagNorm, tiny_base: TinyBase, tmp_path: Path) -> None:
    base = tiny_base(arch)
    adapter, out = make_adapter(base, tmp_path / "a", norm=norm), tmp_path / "out"
    facts = write_merge(plan_merge(str(base), [str(adapter)], out))
    expected, found, before = (
        oracle(base, [(adapter, 1.0)], norm),
        tensors_of(out),
        tensors_of(base),
    )
    assert list(found) == list(before)
    for name, new in found.items():
        if name not in facts["touched"]:
            assert torch.equal(new, before[name]), name
            continue
        torch.testing.assert_close(new.double(), expected[name], rtol=1e-5, atol=1e-6)
        assert not torch.equal(new, before[name])
        change = facts["modules"][name.removesuffix(".weight")]
        W = before[name].double()
        assert change["relative"] == pytest.approx(
            float((expected[name] - W).norm() / W.norm()), rel=1e-4
        )
        if norm.mode == "bounded":
            assert change["largest"] <= norm.tau * (1 + 1e-4)
    assert len(facts["touched"]) == len(A.load(adapter).modules) == len(facts["modules"])


@pytest.mark.long
@pytest.mark.parametrize("norm", NORMS, ids=lambda n: n.mode)
@pytest.mark.parametrize("arch", ["llama", "qwen2", "gpt2"])
def test_same_bits_as_peft_and_loads_in_transformers(
    arch: str, norm: MagNorm, tiny_base: TinyBase, tmp_path: Path
) -> None:
    base = reshard(tiny_base(arch), tmp_path / "base", 3, torch.bfloat16)
    adapter, out = make_adapter(base, tmp_path / "a", norm=norm), tmp_path / "out"
    assert main(["--base", str(base), "--adapter", str(adapter), "--out", str(out)]) == 0
    expected, found = peft_merged(base, adapter, torch.bfloat16), load(out, torch.bfloat16)
    theirs = expected.state_dict()
    for name, tensor in found.state_dict().items():
        assert torch.equal(tensor, theirs[name]), name
    assert torch.equal(logits(found), logits(expected))


def test_blocks_have_the_bits_of_the_whole() -> None:
    generator = torch.Generator().manual_seed(0)
    for out, into in ((3000, 700), (1111, 513), (40, 20000)):
        W = torch.randn(out, into, generator=generator).bfloat16()
        basis = Basis(torch.randperm(out)[:16], torch.randperm(into)[:16])
        U = torch.randn(16, 16, generator=generator) / 50
        for norm in (MagNorm(), BOUNDED):
            whole = merged(W, basis, U, norm).bfloat16()
            for transposed in (False, True):
                stored = W.T.contiguous() if transposed else W
                target = Target("m", (Part("a", 1.0, U, basis, ""),), transposed)
                new, _ = fold_weight(stored, target, norm, torch.bfloat16)
                assert torch.equal(new.T if transposed else new, whole)


def test_what_rounding_loses() -> None:
    W = torch.randn(512, 300, generator=torch.Generator().manual_seed(0)).bfloat16()
    basis = Basis(torch.arange(8), torch.arange(8))
    part = Part("a", 1.0, torch.eye(8) / 100, basis, "")
    exact = merged(W, basis, part.U, BOUNDED).double()
    new, change = fold_weight(W, Target("m", (part,)), BOUNDED, torch.bfloat16)
    assert change is not None
    lost = (exact - new.double()).norm() / (exact - W.double()).norm()
    assert change.lost == pytest.approx(float(lost), rel=1e-3)
    moved = new.double() - W.double()
    assert change.relative == pytest.approx(float(moved.norm() / W.double().norm()), rel=1e-4)
    ratio = (moved / W.double())[W != 0].abs().max()
    assert change.largest == pytest.approx(float(ratio), rel=1e-4)
    # Zeros in W have no ratio; they must not hide the others.
    W[3] = 0
    _, change = fold_weight(W, Target("m", (part,)), MagNorm(), torch.float32)
    assert change is not None and 0 < change.largest < float("inf") and change.lost == 0


def test_a_weighted_sum_is_one_update(llama: Path, tmp_path: Path) -> None:
    first = make_adapter(llama, tmp_path / "first", norm=BOUNDED)
    second = make_adapter(llama, tmp_path / "second", norm=BOUNDED, r=6, seed=1, only=("v_proj",))
    out = tmp_path / "out"
    write_merge(plan_merge(str(llama), [f"{first}*0.5", f"{second}*-2"], out))
    expected = oracle(llama, [(first, 0.5), (second, -2.0)], BOUNDED)
    for name, tensor in tensors_of(out).items():
        torch.testing.assert_close(tensor.double(), expected[name].double(), rtol=1e-5, atol=1e-6)


def test_files_go_along(llama: Path, tmp_path: Path) -> None:
    base = reshard(llama, tmp_path / "base", 2)
    (base / "LICENSE").write_text("all yours")
    (base / "README.md").write_text("the base's own card")
    for other in ("pytorch_model.bin", "consolidated.safetensors", "m.gguf", "adapter_config.json"):
        (base / other).write_text("{}")
    (base / "onnx").mkdir()
    adapter, out = make_adapter(base, tmp_path / "a", only=("q_proj",)), tmp_path / "out"
    write_merge(plan_merge(str(base), [str(adapter)], out, "bfloat16"))
    shards = {f"model-0000{i}-of-00002.safetensors" for i in (1, 2)}
    assert {p.name for p in out.iterdir()} == shards | {
        *("LICENSE", "README.md", "chat_template.jinja", "config.json", "generation_config.json"),
        *("model.safetensors.index.json", "secura_manifest.json", "tokenizer.json"),
        "tokenizer_config.json",
    }
    tensors = tensors_of(out)
    assert all(t.dtype == torch.bfloat16 for t in tensors.values())
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(out).dtype == torch.bfloat16
    before = tensors_of(llama)
    assert torch.equal(tensors["lm_head.weight"], before["lm_head.weight"].bfloat16())
    card = (out / "README.md").read_text()
    assert "base_model:" in card and str(tmp_path) not in card
    assert str(tmp_path) not in (out / "secura_manifest.json").read_text()
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_old_gpt2_names_and_the_mask_buffers(tiny_base: TinyBase, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_base("gpt2"), base)
    tensors = load_file(base / "model.safetensors")
    old = {k.removeprefix("transformer."): v for k, v in tensors.items()}
    old["h.0.attn.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.uint8)
    save_file(old, base / "model.safetensors", metadata={"format": "pt"})
    adapter, out = make_adapter(base, tmp_path / "a", norm=BOUNDED), tmp_path / "out"
    facts = write_merge(plan_merge(str(base), [str(adapter)], out))
    expected, found = oracle(base, [(adapter, 1.0)], BOUNDED), tensors_of(out)
    assert set(found) == set(old) and "h.0.attn.c_attn.weight" in facts["touched"]
    for name, tensor in found.items():
        torch.testing.assert_close(tensor.double(), expected[name].double(), rtol=1e-5, atol=1e-6)


def test_refusals_name_every_reason(llama: Path, tmp_path: Path, capsys: Any) -> None:
    plain, half = make_adapter(llama, tmp_path / "plain"), MagNorm("bounded", tau=0.5)
    bounded = make_adapter(llama, tmp_path / "bounded", norm=BOUNDED)
    other = make_adapter(llama, tmp_path / "other", norm=half)
    published = make_adapter(llama, tmp_path / "published", norm=MagNorm("published"))
    base, out = ("--base", str(llama)), ("--out", str(tmp_path / "out"))

    def says(
        *adapters: Path | str,
        base: tuple[str, ...] = base,
        more: tuple[str, ...] = (),
        status: int = 1,
    ) -> str:
        named = [word for a in adapters for word in ("--adapter", str(a))]
        return complaint(*base, *named, *out, *more, capsys=capsys, status=status)

    for pair in ((plain, bounded), (bounded, other)):
        assert "same mode and parameters" in says(*pair)
    assert "alone" in says(published, f"{plain}") and "alone" in says(f"{published}*0.5")
    assert "given twice" in says(plain, plain)
    for number in ("0", "nan", "1e30", "-1001"):
        said = says(f"{plain}*{number}", status=2)
        assert "no weight" in said and "between -1000 and 1000" in said
    assert "no adapter" in says(status=2)
    for mode in ("reference", "activation"):
        config = json.loads((plain / "adapter_config.json").read_text())
        config["magnorm"] = {"mode": mode, "scale": 6.0, "eps": 1e-8}
        shutil.copytree(plain, tmp_path / mode)
        (tmp_path / mode / "adapter_config.json").write_text(json.dumps(config))
        assert "acts on activations" in says(tmp_path / mode)
    assert "--base is missing" in says(plain, base=(), status=2)
    assert "belong together" in says(plain, more=("--rank", "3"), status=2)
    # All at once: base, adapters and output.
    (tmp_path / "out").mkdir()
    nowhere = ("--base", str(tmp_path / "nowhere"))
    said = says(tmp_path / "none", f"{plain}*x", base=nowhere, status=2)
    assert all(part in said for part in ("none: no such folder", "*x", "nowhere", "out exists"))
    assert list((tmp_path / "out").iterdir()) == []


def test_damaged_and_foreign_bases(
    llama: Path, tiny_base: TinyBase, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    adapter, out = make_adapter(llama, tmp_path / "a"), tmp_path / "out"

    def says(base: Path, *more: str) -> str:
        return complaint(
            *("--base", str(base), "--adapter", str(adapter), "--out", str(out), *more),
            capsys=capsys,
        )

    assert "another base" in says(tiny_base("mistral"))
    assert "no such linear layer" in says(tiny_base("gpt2"))
    for name, harm in (
        ("model-00001-of-00003.safetensors", lambda p: os.truncate(p, p.stat().st_size - 5)),
        ("model-00002-of-00003.safetensors", Path.unlink),
    ):
        base = reshard(llama, tmp_path / name, 3)
        harm(base / name)
        assert name in says(base)
    lacking = reshard(llama, tmp_path / "lacking", 1)
    file = lacking / "model-00001-of-00001.safetensors"
    tensors = load_file(file)
    gone = tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, file)
    assert "up_proj" in says(lacking)
    # Only the middle differs: all of it is named, and before anything is written.
    middle = ("model.layers.0.mlp.up_proj.weight", "model.layers.1.self_attn.k_proj.weight")
    save_file(
        tensors
        | {"model.layers.1.mlp.up_proj.weight": gone}
        | {name: tensors[name] + 1 for name in middle},
        file,
    )
    for more in ((), ("--dry-run",)):
        said = says(lacking, *more)
        assert "nothing was done" in said and said.count("- ") == 2
        assert all(name.removesuffix(".weight") in said for name in middle)
    # NaN outside the rows and columns that the fingerprint knows; the first module is probed.
    sick = tensors | {"model.layers.1.mlp.up_proj.weight": gone}
    cur = A.load(adapter).modules["model.layers.0.mlp.up_proj"]
    row = next(i for i in range(384) if i not in cur.rows)
    col = next(i for i in range(256) if i not in cur.cols)
    W = sick["model.layers.0.mlp.up_proj.weight"] = sick[
        "model.layers.0.mlp.up_proj.weight"
    ].clone()
    W[row, col] = float("nan")
    save_file(sick, file)
    assert "NaN or Inf" in says(lacking)
    W[row, col] = 1e30
    save_file(sick, file)
    assert "NaN or Inf" in says(lacking, "--dtype", "float16")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 0))
    assert "MiB free" in says(llama)
    assert sorted(p.name for p in tmp_path.iterdir() if "out" in p.name) == []


def test_dry_run_and_check(llama: Path, tmp_path: Path, capsys: Any) -> None:
    adapter, out = make_adapter(llama, tmp_path / "a", norm=BOUNDED), tmp_path / "out"
    flags = ["--base", str(llama), "--adapter", str(adapter), "--out", str(out)]
    assert main([*flags, "--dry-run"]) == 0 and not out.exists()
    assert "14 of 21 tensors" in capsys.readouterr().out
    assert "not there" in complaint(*flags, "--check", capsys=capsys, status=2)
    assert main(flags) == 0 and main([*flags, "--check"]) == 0
    assert "exists" in complaint(*flags, capsys=capsys, status=2)
    # Another adapter is told by the manifest alone, the same under another name is not another.
    twice = [*flags[:3], f"{adapter}*2", *flags[4:], "--check"]
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr("secura_serve.merge.check.output_tensors")
        assert "made with a*1, not with a*2" in complaint(*twice, capsys=capsys)
    moved = shutil.copytree(adapter, tmp_path / "moved")
    assert main([*flags[:3], str(moved), *flags[4:], "--check"]) == 0
    tensors = load_file(out / "model.safetensors")
    for name in ("model.norm.weight", "model.layers.0.mlp.up_proj.weight"):
        tensors[name].view(-1)[-1] += 1
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "tokenizer_config.json").write_text("{}")
    said = complaint(*flags, "--check", capsys=capsys)
    assert all(n in said for n in ("model.norm.weight", "up_proj", "tokenizer_config.json"))
    assert said.count("- ") == 3
    assert "other tensors" in complaint(*flags, "--check", "--dtype", "float16", capsys=capsys)


def test_to_base(llama: Path, tiny_base: TinyBase, tmp_path: Path, capsys: Any) -> None:
    base = reshard(llama, tmp_path / "base", 2)
    adapter, out = make_adapter(base, tmp_path / "a", norm=BOUNDED), tmp_path / "out"
    write_merge(plan_merge(str(base), [str(adapter)], out))
    other = tiny_base("mistral")
    said = complaint("--to-base", str(other), "--out", str(out), capsys=capsys)
    assert said.count("other values") == 6 and "and 8 more" in said
    manifest = out / "secura_manifest.json"
    text = manifest.read_text()
    facts = json.loads(text)
    assert facts["format_version"] == 2
    for name, digest in facts["touched"].items():
        W = tensors_of(base)[name]
        data = f"F32|{'x'.join(map(str, W.shape))}|".encode() + W.numpy().tobytes()
        assert digest == f"blake3:{blake3(data).hexdigest()}"
    for change in ({"format_version": 1}, {"touched": {"x": "sha256:00"}}):
        manifest.write_text(json.dumps(facts | change))
        said = complaint("--to-base", str(base), "--out", str(out), capsys=capsys)
        assert "can be used" in said and ("not 2" in said or "digests by sha256" in said)
    manifest.write_text(text)
    assert main(["--to-base", str(base), "--out", str(out)]) == 0
    after, before = tensors_of(out), tensors_of(base)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not (out / "secura_manifest.json").exists() and torch.equal(
        logits(load(out)), logits(load(llama))
    )
    told = complaint("--to-base", str(base), "--out", str(out), capsys=capsys, status=2)
    assert "secura_manifest" in told
    half = tmp_path / "half"
    write_merge(plan_merge(str(base), [str(adapter)], half, "bfloat16"))
    assert "do not fit" in complaint("--to-base", str(base), "--out", str(half), capsys=capsys)
    assert (half / "config.json").exists()


@pytest.mark.parametrize("arch", ["llama", "qwen2", "gpt2"])
def test_to_lora_is_exact(arch: str, tiny_base: TinyBase, tmp_path: Path) -> None:
    from peft import PeftModel

    base = tiny_base(arch)
    first = make_adapter(base, tmp_path / "first")
    second = make_adapter(base, tmp_path / "second", seed=1, only=("q_proj", "c_attn"))
    flags = ["--base", str(base), "--adapter", str(first), "--adapter", f"{second}*0.5"]
    lora, out = tmp_path / "lora", tmp_path / "out"
    assert main([*flags, "--out", str(lora), "--to-lora"]) == 0
    assert main([*flags, "--out", str(out)]) == 0
    model = PeftModel.from_pretrained(load(base), lora)
    config = json.loads((lora / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["lora_alpha"] == config["r"] == 8
    torch.testing.assert_close(logits(model), logits(load(out)), rtol=1e-4, atol=1e-4)
    assert (logits(model) - logits(load(base))).abs().max() > 0.1
    merged_back = model.merge_and_unload().state_dict()
    for name, tensor in load(out).state_dict().items():
        torch.testing.assert_close(merged_back[name], tensor, rtol=1e-4, atol=1e-5)


def test_to_lora_approximates_when_asked(llama: Path, tmp_path: Path, capsys: Any) -> None:
    adapter, lora = make_adapter(llama, tmp_path / "a", norm=BOUNDED), tmp_path / "lora"
    flags = ["--to-lora", "--base", str(llama), "--adapter", str(adapter), "--out", str(lora)]
    assert "--approximate" in complaint(*flags, capsys=capsys) and not lora.exists()
    assert main([*flags, "--approximate", "--rank", "16"]) == 0
    errors = json.loads((lora / "secura_manifest.json").read_text())["modules"]
    files, before = load_file(lora / "adapter_model.safetensors"), tensors_of(llama)
    after = oracle(llama, [(adapter, 1.0)], BOUNDED)
    for module, error in errors.items():
        D = after[f"{module}.weight"] - before[f"{module}.weight"].double()
        A_, B = (files[f"base_model.model.{module}.lora_{x}.weight"].double() for x in "AB")
        best = torch.linalg.svdvals(D)[16:].norm() / D.norm()
        assert error == pytest.approx(float(best), rel=1e-3)
        assert float((D - B @ A_).norm() / D.norm()) == pytest.approx(error, rel=1e-3)
    assert "exceeds" in complaint(
        *flags[:-1], str(tmp_path / "x"), "--approximate", "--rank", "200", capsys=capsys
    )


def test_the_stream_needs_no_files(llama: Path, tmp_path: Path) -> None:
    source = open_source(str(llama), [str(make_adapter(llama, tmp_path / "a", only=("q_proj",)))])
    plan = plan_fold(source, torch.float32)
    tensors = tensors_of(llama)
    came = list(fold_stream(tensors.items(), plan))
    assert [name for name, _ in came] == list(tensors)
    assert all((new is tensors[n]) == (n not in plan.targets) for n, new in came)
    gone, *rest = plan.targets
    partial = {n: t for n, t in tensors.items() if n != gone}
    with pytest.raises(MergeError, match=f"{gone}: is to be folded, but was not in the stream"):
        list(fold_stream(partial.items(), plan))
    wrong = tensors | {name: tensors[name] * 2 for name in plan.targets}
    with pytest.raises(MergeError) as caught:
        list(fold_stream(wrong.items(), plan))
    assert len(caught.value.problems) == len(plan.targets) == 1 + len(rest)
    assert list(fold_stream({}.items(), FoldPlan({}, MagNorm()))) == []


def test_a_plan_that_was_checked_is_not_checked_again(
    llama: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    adapter, seen = make_adapter(llama, tmp_path / "a", norm=BOUNDED), list[int]()

    def counted(*args: Any) -> str:
        seen.append(1)
        return A.fingerprint_of(*args)

    # By its name: the package has a function called `verify` as well.
    module = sys.modules["secura_serve.adapter.verify"]
    monkeypatch.setattr(module, "fingerprint_of", counted)
    plan = plan_merge(str(llama), [str(adapter)], tmp_path / "out")
    # The first and the last one are compared as soon as the base is opened.
    assert plan.fold.checked and len(seen) == len(plan.fold.targets) + 2
    write_merge(plan)
    assert len(seen) == len(plan.fold.targets) + 2
    # Nothing is known about an output that is only compared, or about a stream of anyone else's.
    assert not plan_merge(str(llama), [str(adapter)], tmp_path / "out", exists=True).fold.checked
    assert not plan_fold(open_source(str(llama), [str(adapter)])).checked


def test_threads_change_neither_bits_nor_order_nor_complaints(llama: Path, tmp_path: Path) -> None:
    adapter = make_adapter(llama, tmp_path / "a", norm=BOUNDED)
    plan = plan_fold(open_source(str(llama), [str(adapter)]))
    tensors = tensors_of(llama)
    alone = list(fold_stream(tensors.items(), plan))
    with ThreadPoolExecutor(3) as pool:
        together = list(fold_stream(tensors.items(), plan, pool=(pool, 3)))
        assert [name for name, _ in together] == [name for name, _ in alone]
        assert all(torch.equal(a, b) for (_, a), (_, b) in zip(alone, together, strict=True))
        targets = sorted(plan.targets)
        wrong = {n: t * 2 if n in targets[2:4] else t for n, t in tensors.items()}
        with pytest.raises(MergeError) as caught:
            list(fold_stream(wrong.items(), plan, pool=(pool, 3)))
    assert len(caught.value.problems) == 2


def test_help_is_instant() -> None:
    code = "import sys; from secura_serve.merge.main import main\ntry: main(['--help'])\n"
    code += "except SystemExit: pass\nassert 'torch' not in sys.modules"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--to-base" in said.stdout


@pytest.mark.long
def test_a_result_that_cannot_be_printed_is_one_line(llama: Path, tmp_path: Path) -> None:
    adapter, out = make_adapter(llama, tmp_path / "a", norm=BOUNDED), tmp_path / "out"
    flags = ["--base", str(llama), "--adapter", str(adapter), "--out", str(out)]
    command = [warm.python(), "-c", "from secura_serve.cli import merge; merge()", *flags]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1 and out.is_dir()
    assert done.stderr.count("\n") == 1 and "No space left" in done.stderr, done.stderr


def test_a_stamp_holds_until_a_file_or_an_index_changes(
    llama: Path, tiny_base: TinyBase, tmp_path: Path
) -> None:
    base = reshard(llama, tmp_path / "base", 2)
    adapter = make_adapter(base, tmp_path / "a", norm=BOUNDED)

    def stamp_of(folder: Path) -> str:
        source = open_source(str(base), [str(folder)])
        return base_stamp(source, plan_fold(source, torch.bfloat16))

    stamp = verify_base(str(base), [str(adapter)])
    assert stamp_of(adapter) == stamp
    assert stamp_of(make_adapter(base, tmp_path / "b", norm=BOUNDED, only=("q_proj",))) != stamp
    shard = sorted(base.glob("*.safetensors"))[0]
    tensors = load_file(shard)
    targets = set(plan_fold(open_source(str(base), [str(adapter)])).targets)
    # Neither the first nor the last module: those are looked at when the base is opened.
    hit = sorted(targets & set(tensors))[1]
    whole = shard.read_bytes()
    tensors[hit] = tensors[hit] + 1
    save_file(tensors, shard, metadata={"format": "pt"})
    assert stamp_of(adapter) != stamp
    with pytest.raises(MergeError, match="other weights"):
        verify_base(str(base), [str(adapter)])
    # The same bytes again are another file all the same.
    shard.write_bytes(whole)
    assert stamp_of(adapter) != stamp and verify_base(str(base), [str(adapter)]) == stamp_of(
        adapter
    )


# ---- a merge that is stopped -------------------------------------------------------------------


def _loads(folder: Path) -> bool:
    try:
        load(folder)
    except (OSError, ValueError):
        return False
    return True


@pytest.mark.long
def test_kill_9_leaves_nothing_that_loads(llama: Path, tmp_path: Path) -> None:
    base = reshard(llama, tmp_path / "base", 2)
    adapter = make_adapter(base, tmp_path / "a", norm=BOUNDED, only=("q_proj", "up_proj"))
    flags = ["--base", str(base), "--adapter", str(adapter)]
    *killed, whole = killed_at_every_step(tmp_path / "killed", flags)
    assert len(killed) > 20 and whole.is_dir() and len(list(whole.parent.iterdir())) == 1
    assert main([*flags, "--out", str(whole), "--check"]) == 0
    for out in killed:
        found = [p for p in out.parent.rglob("*") if p.is_dir()]
        complete = [p for p in found if (p / "config.json").exists()]
        # config.json is the last file, written when all others have reached the disk.
        for folder in complete:
            assert main([*flags, "--out", str(folder), "--check"]) == 0
        assert not out.exists() or out in complete
        assert not any(_loads(folder) for folder in found if folder not in complete)
    # The next merge of that name clears up.
    again = killed[len(killed) // 2]
    assert main([*flags, "--out", str(again)]) == 0
    assert [p.name for p in again.parent.iterdir()] == ["out"]


def test_a_full_disk_leaves_nothing(llama: Path, tmp_path: Path, capsys: Any) -> None:
    base = reshard(llama, tmp_path / "base", 2)
    adapter = make_adapter(base, tmp_path / "a", only=("q_proj", "up_proj"))
    flags = ["--base", str(base), "--adapter", str(adapter), "--out", str(tmp_path / "out")]

    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        steps = at_step(10**9, full, lambda n, f: patch.setattr(os, n, f))
        assert main(flags) == 0
    shutil.rmtree(tmp_path / "out")
    # After the renaming the merge is there; that its name reached the disk is not waited for.
    hits = range(steps.index("rename"))
    for step in hits[:: max(1, len(hits) // 12)]:
        with pytest.MonkeyPatch.context() as patch:
            at_step(step, full, lambda n, f: patch.setattr(os, n, f))
            assert "No space left" in complaint(*flags, capsys=capsys)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "base"]


@pytest.mark.slow
def test_peak_memory_is_flat(tmp_path: Path) -> None:
    """Twice the layers, the same peak; far below the checkpoint's size."""
    peaks = []
    for layers in (8, 16):
        base = tmp_path / f"base-{layers}"
        base.mkdir()
        W = torch.randn(4096, 4096, generator=torch.Generator().manual_seed(0)).bfloat16()
        names = [f"model.layers.{i}.self_attn.q_proj.weight" for i in range(layers)]
        save_file({n: W + i for i, n in enumerate(names)}, base / "model.safetensors")
        (base / "config.json").write_text(json.dumps({"model_type": "llama"}))
        adapter = make_adapter(base, tmp_path / f"a-{layers}")
        code = "import sys; from secura_serve.merge.main import main\n"
        code += "assert main(sys.argv[1:]) == 0\n"
        # Not getrusage: its peak includes the parent's, from before the exec.
        code += "print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
        flags = ("--base", base, "--adapter", adapter, "--out", tmp_path / f"out-{layers}")
        done = subprocess.run(
            [sys.executable, "-c", code, *map(str, flags)], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout.split()[-1]) / 2**10)
    assert abs(peaks[1] - peaks[0]) < 48, peaks
    assert peaks[1] < 700, peaks
