"""Proves how a run of secura-train behaves: that every method writes what its users expect, that a
killed or interrupted run goes on to the same bits, that gradient accumulation and packing change
nothing but speed, and that early stopping keeps the best.

Needs peft, transformers, accelerate and the tiny bases of conftest.py; processes are really killed.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from secura_serve import adapter
from secura_serve.errors import ConfigError
from secura_serve.merge import main as merge
from secura_serve.train.data import Collator, Rows, encode, mix
from secura_serve.train.data.records import read_jsonl
from secura_serve.train.loop.fit import fit
from secura_serve.train.loop.loss import answer_logits, score_rows, summed_cross_entropy
from secura_serve.train.loop.packing import packer
from secura_serve.train.main import main, settings
from secura_serve.train.memory import estimate
from secura_serve.train.methods import checkpoint_tensors, prepare, restore
from secura_serve.train.output.checkpoints import RunFolder
from tests.support import warm
from tests.support.training import PAIRS, command, environment, flags, same, tensors, write

TinyBase = Callable[[str], Path]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write(tmp_path / "sums.jsonl", PAIRS)


@pytest.mark.long
@pytest.mark.parametrize("method", ["lora", "dora", "full"])
def test_other_methods_write_plain_folders(
    tiny_base: TinyBase, data: Path, tmp_path: Path, method: str
) -> None:
    base, out = tiny_base("llama"), tmp_path / method
    argv = flags(
        base, data, out, "--method", method, "--learning-rate", "0.001", "--max-steps", "3"
    )
    if method == "full":
        argv = [a for a in argv if a not in ("--rank", "8")]
    assert main(argv) == 0
    facts = json.loads((out / "train.json").read_text())
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    names = {p.name for p in out.iterdir()}
    assert {"README.md", "train.json", "curves.json", "curves.png"} <= names
    if method == "full":
        assert "model.safetensors" in names and "tokenizer.json" in names
        tuned = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
        assert facts["trainable_parameters"] == sum(p.numel() for p in plain.parameters())
    else:
        raw = json.loads((out / "adapter_config.json").read_text())
        assert raw["peft_type"] == "LORA" and raw["use_dora"] is (method == "dora")
        tuned = PeftModel.from_pretrained(plain, out)
    records = read_jsonl(data)
    rows = encode(records, AutoTokenizer.from_pretrained(base), 512)[:4]
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    after, before = (score_rows(m, rows, Collator(0), 4)["loss"] for m in (tuned, plain))
    assert after < before
    again = tmp_path / "again"
    recipe = ["--config", str(out / "train.json"), "--base", str(base), "--data", str(data)]
    assert main([*recipe, "--out", str(again)]) == 0
    assert same(out, again)


@pytest.mark.long
def test_full_training_in_bfloat16_writes_bfloat16(
    tiny_base: TinyBase, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "full"
    argv = ["--base", str(tiny_base("llama")), "--data", str(data), "--out", str(out)]
    assert main([*argv, "--method", "full", "--device", "cpu", "--max-steps", "2"]) == 0
    assert all(t.dtype == torch.bfloat16 for t in tensors(out).values())
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"


def test_overwrite_replaces_an_adapter_and_nothing_else(
    tiny_base: TinyBase, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "work").touch()
    (tmp_path / "file").touch()
    for out in ("project", "file", "file/x"):
        assert main(flags(tiny_base("llama"), data, tmp_path / out, "--overwrite")) == 2
        assert "is not replaced" in (err := capfd.readouterr().err) or "cannot be written" in err
    assert (tmp_path / "project" / "work").exists()
    assert main(flags(tiny_base("llama"), data, tmp_path / "a", "--run-dir", "/proc/r")) == 2
    assert "--run-dir" in capfd.readouterr().err


def test_a_training_that_diverges_stops_before_its_next_checkpoint(
    tiny_base: TinyBase, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    argv = flags(
        tiny_base("llama"), data, tmp_path / "d", "--learning-rate", "1e30", "--save-steps", "2"
    )
    assert main([*argv, "--warmup-steps", "0"]) == 1
    err = capfd.readouterr().err
    assert "the loss of step 2 is" in err and "Lower --learning-rate (now 1e+30)" in err
    assert not list(tmp_path.glob(".d.run/checkpoint-*")) and not (tmp_path / "d").exists()


@pytest.mark.parametrize(
    "wrong, said",
    [
        ("--layers 3-1 --targets q_proj", "a range must go upwards"),
        ("--seed -1", "seed: got -1, must be in [0, 2**32)"),
        ("--init svd", "init: needs core ab"),
        ("--tau 0.1", "tau: needs magnorm bounded, got none"),
        ("--method secura --tau 0", "tau: got 0.0, must be > 0"),
        ("--eval-split 0.01", "0.01 of 16 examples leaves nothing to evaluate on"),
        ("--targets q_proj,nosuch", "nosuch names no module"),
        ("--exclude q_proj,nosuch", "--exclude: the base has no module nosuch"),
        ("--targets nosuch", "the linear layers are down_proj, gate_proj, k_proj"),
        ("--targets q_proj --layers 0,7", "--layers: the base has layers 0-1, got [7]"),
        ("--alpha nan", "alpha: got 'nan', must be"),
        ("--learning-rate inf", "--learning-rate: got inf, must be > 0 and finite"),
        ("--max-steps 0", "--max-steps: got 0, must be -1 or >= 1"),
        ("--magnorn none", "did you mean --magnorm?"),
    ],
)
def test_settings_that_mean_nothing_are_refused(
    wrong: str, said: str, tiny_base: TinyBase, data: Path, tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert main(flags(tiny_base("llama"), data, tmp_path / "o", *wrong.split())) == 2
    assert said in capfd.readouterr().err


@pytest.mark.long
def test_secura_is_core_ab_with_bounded(tiny_base: TinyBase, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "s"
    more = ["--method", "secura", "--inner-rank", "12", "--targets", r".*layers\.1\..*[qv]_proj"]
    assert main(flags(tiny_base("llama"), data, out, *more)) == 0
    found = adapter.load(out)
    assert (found.config.core, found.config.magnorm.mode) == ("ab", "bounded")
    assert set(found.modules) == {f"model.layers.1.self_attn.{x}_proj" for x in "qv"}


@pytest.mark.long
@pytest.mark.parametrize(
    ("more", "modules"),
    [
        (["--targets", "q_proj,v_proj"], 4),
        (["--targets", "q_proj,v_proj", "--layers", "1"], 2),
        (["--exclude", "down_proj"], 12),
        (["--exclude", r".*layers\.0\..*"], 7),
    ],
)
def test_targets_are_chosen_as_in_peft(
    tiny_base: TinyBase, data: Path, tmp_path: Path, more: list[str], modules: int
) -> None:
    out = tmp_path / "t"
    assert main(flags(tiny_base("llama"), data, out, "--max-steps", "1", *more)) == 0
    assert len(adapter.load(out).modules) == modules


@pytest.mark.long
@pytest.mark.parametrize("mode", ["activation", "reference"])
def test_reproduction_only_modes_say_so(
    tiny_base: TinyBase, data: Path, tmp_path: Path, mode: str, capfd: Any
) -> None:
    out = tmp_path / mode
    more = ["--method", "secura", "--magnorm", mode, "--max-steps", "2"]
    assert main(flags(tiny_base("llama"), data, out, *more)) == 0
    assert "cannot be merged or served" in capfd.readouterr().out
    assert "cannot be merged or served" in (out / "README.md").read_text()
    assert merge.main(
        ["--base", str(tiny_base("llama")), "--adapter", str(out), "--out", str(tmp_path / "m")]
    )


RESUMED = [
    (["--method", "secura", "--fusion-step", "3"], "kill"),
    (["--method", "lora", "--dropout", "0.2"], "interrupt"),
]


@pytest.mark.long
@pytest.mark.parametrize(("more", "how"), RESUMED)
def test_a_stopped_run_goes_on_to_the_same_bits(
    tiny_base: TinyBase,
    data: Path,
    tmp_path: Path,
    more: list[str],
    how: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Stopped in the second of five epochs, in the middle of an epoch."""
    more = [*more, "--max-steps", "15", "--save-steps", "2", "--eval-steps", "5"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(flags(tiny_base("llama"), data, whole, *more)) == 0
    assert not (tmp_path / ".whole.run").exists()

    argv, folder = flags(tiny_base("llama"), data, parts, *more), tmp_path / ".parts.run"
    # Slowed down, so that it is stopped where it should be.
    slow = (
        "import sys, time; from transformers import TrainerCallback;"
        "import secura_serve.train.callbacks as c; "
        "end = c.Progress.on_step_end;"
        "c.Progress.on_step_end = lambda *a, **k: (time.sleep(.2), end(*a, **k))[1];"
        "from secura_serve.train.main import main; sys.exit(main(sys.argv[1:]))"
    )
    started = subprocess.Popen(
        [*command()[:1], "-c", slow, *argv], env=environment(), stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not (folder / "checkpoint-4" / "trainer_state.json").exists():
        assert started.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    if how == "kill":
        warm.kill(started)
    else:
        started.send_signal(signal.SIGINT)
    _, told = started.communicate(timeout=60)
    assert started.returncode == (-signal.SIGKILL if how == "kill" else 130)
    assert how == "kill" or "--resume auto" in told
    assert not parts.exists()
    size = sum(f.stat().st_size for f in (folder / "checkpoint-4").iterdir())
    assert size < (tiny_base("llama") / "model.safetensors").stat().st_size / 4

    # Without the word it is refused, and so are other settings.
    assert main(argv) == 2
    assert main([*argv, "--resume", "auto", "--learning-rate", "0.5"]) == 2
    assert main([*argv, "--resume", "auto"]) == 0
    before = parts.stat()
    assert main([*argv, "--resume", "auto"]) == 0 and parts.stat() == before
    assert "is finished, with these settings" in capsys.readouterr().err
    assert main([*argv, "--resume", "auto", "--seed", "9"]) == 2
    assert same(whole, parts)
    left, right = (json.loads((p / "train.json").read_text())["scores"] for p in (whole, parts))
    assert left == right
    curves = [json.loads((p / "curves.json").read_text()) for p in (whole, parts)]
    assert curves[0] == curves[1] and len(curves[0]["train"]) == 15
    assert [p["step"] for p in curves[0]["held_out"]] == [5, 10, 15]


@pytest.mark.long
def test_a_run_that_is_all_warm_up_says_so(
    tiny_base: TinyBase, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for warmup, said in (("0.05", True), ("0", False)):
        out = tmp_path / f"warmup-{warmup}"
        argv = flags(tiny_base("llama"), data, out, "--max-steps", "1", "--warmup-steps", warmup)
        assert main(argv) == 0
        assert ("nothing was learnt" in capsys.readouterr().err) is said
        assert any(t.any() for k, t in tensors(out).items() if k.endswith("_U")) is not said


@pytest.mark.long
@pytest.mark.parametrize("torn", ["trainer_state.json", "trained.safetensors", "optimizer.pt"])
def test_a_torn_checkpoint_is_passed_over(
    torn: str, tiny_base: TinyBase, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    more = ["--run-dir", str(run), "--save-steps", "2"]
    argv = flags(tiny_base("llama"), data, tmp_path / "a", *more)
    assert main(argv) == 0
    first = tensors(tmp_path / "a")
    os.truncate(run / "checkpoint-6" / torn, 100)
    assert main([*argv, "--resume", "auto", "--overwrite"]) == 0
    told = capfd.readouterr().err
    assert "damaged, so not used: checkpoint-6" in told and "goes on from" in told
    assert all(torch.equal(first[k], v) for k, v in tensors(tmp_path / "a").items())
    assert main([*argv, "--resume", str(run / "checkpoint-5"), "--overwrite"]) == 2


def test_a_folder_is_one_runs_at_a_time(
    tiny_base: TinyBase, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    argv = flags(tiny_base("llama"), data, tmp_path / "a")
    with RunFolder(settings(argv)).locked():
        for more in ([], ["--overwrite"], ["--resume", "auto"]):
            assert main([*argv, *more]) == 2
            assert "another run is at work in" in capfd.readouterr().err
    assert main(argv) == 0
    assert not (tmp_path / ".a.run").exists()


def prepared(base: Path, data: Path, *more: str) -> tuple[Any, Rows]:
    config = settings(flags(base, data, Path("unused"), "--max-steps", "2", *more))
    set_seed(0)
    tuned = prepare(config)
    return tuned, encode(read_jsonl(data), tuned.tokenizer, 512)


def trained(tuned: Any) -> dict[str, torch.Tensor]:
    return {k: v.detach().clone() for k, v in checkpoint_tensors(tuned.model).items()}


@pytest.mark.long
@pytest.mark.parametrize(
    "more",
    [["--per-device-train-batch-size", "4", "--gradient-accumulation-steps", "2"], ["--packing"]],
)
def test_accumulated_and_packed_batches_are_the_same_step(
    tiny_base: TinyBase, data: Path, more: list[str]
) -> None:
    results = []
    for given in ([], more):
        tuned, rows = prepared(
            tiny_base("llama"), data, "--per-device-train-batch-size", "8", *given
        )
        fit(tuned, rows)
        results.append(trained(tuned))
    for name, value in results[0].items():
        torch.testing.assert_close(value, results[1][name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("arch", ["llama", "qwen2", "gemma2", "mistral", "gpt2"])
def test_packed_examples_do_not_see_each_other(tiny_base: TinyBase, data: Path, arch: str) -> None:
    base = tiny_base(arch)
    tokenizer = AutoTokenizer.from_pretrained(base)
    attention = "eager" if arch == "gemma2" else None
    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, attn_implementation=attention
    ).eval()
    rows = encode(read_jsonl(data), tokenizer, 512)[:3]
    padded = Collator(tokenizer.pad_token_id)
    with torch.no_grad():
        packed, _ = answer_logits(model, packer(model, rows, padded)(rows))
        # The last example of the row, against itself alone.
        alone, _ = answer_logits(model, padded(rows[2:]))
    torch.testing.assert_close(packed[0, -alone.shape[1] :], alone[0], rtol=1e-3, atol=1e-3)


def test_a_model_that_cannot_be_packed_is_refused(tiny_base: TinyBase, data: Path) -> None:
    tuned, rows = prepared(tiny_base("llama"), data)
    real = tuned.model.forward

    def blind(*args: Any, position_ids: torch.Tensor, **kwargs: Any) -> Any:
        order = torch.arange(position_ids.shape[1])[None].expand_as(position_ids)
        return real(*args, position_ids=order, **kwargs)

    tuned.model.forward = blind
    with pytest.raises(ConfigError, match="see each other"):
        packer(tuned.model, rows, Collator(0))


@pytest.mark.long
def test_one_model_learns_task_after_task(tiny_base: TinyBase, data: Path) -> None:
    """The loop of continual learning: rows, replay and a penalty."""
    tuned, rows = prepared(tiny_base("llama"), data)
    first, second = rows[:8], rows[8:]
    fit(tuned, first)
    after_first = trained(tuned)
    moved = []
    for weight in (0.0, 1e4):
        restore(tuned.model, after_first)

        def stay(model: Any, batch: Any, logits: torch.Tensor, weight: float = weight) -> Any:
            assert logits.ndim == 3 and "labels" in batch
            far = [
                (p - after_first[n]).square().sum()
                for n, p in checkpoint_tensors(tuned.model).items()
                if p.requires_grad
            ]
            return weight * torch.stack(far).sum()

        found = fit(
            tuned,
            mix(second, first, 0.5, seed=0),
            config=replace(tuned.config, max_steps=6),
            held_out=first,
            extra_loss=stay,
        )
        assert found.steps == 6 and set(found.held_out) >= {"loss", "token_accuracy"}
        now = trained(tuned)
        moved.append(sum(float((now[k] - v).float().norm()) for k, v in after_first.items()))
    assert 0 < moved[1] < 0.7 * moved[0]


def test_replay_draws_a_share_of_earlier_rows() -> None:
    rows, earlier = ([{"input_ids": [k, i]} for i in range(10)] for k in (1, 0))
    found = mix(rows, earlier, 2.5, seed=3)
    assert found[:10] == rows and len(found) == 35
    drawn = [row["input_ids"][1] for row in found[10:]]
    assert all(drawn.count(i) in (2, 3) for i in range(10))
    assert found == mix(rows, earlier, 2.5, seed=3) != mix(rows, earlier, 2.5, seed=4)
    assert mix(rows, [], 0.5, seed=0) == rows


@pytest.mark.long
def test_early_stopping_keeps_the_best(
    tiny_base: TinyBase, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "early"
    # So large a rate that it only gets worse after some steps.
    more = ["--max-steps", "60", "--eval-steps", "2", "--patience", "2", "--learning-rate", "0.3"]
    more += ["--lr-scheduler-type", "constant", "--warmup-steps", "0"]
    assert main(flags(tiny_base("llama"), data, out, *more)) == 0
    held = json.loads((out / "curves.json").read_text())["held_out"]
    scores = json.loads((out / "train.json").read_text())["scores"]
    best = min(held, key=lambda p: p["loss"])
    assert f"step {best['step']}, the best, is kept" in capfd.readouterr().err
    assert scores["steps"] == best["step"] + 4 == held[-1]["step"] < 60
    assert scores["held_out_loss"] == best["loss"]
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert adapter.load(out).modules


@pytest.mark.slow
def test_two_processes_make_the_step_of_a_doubled_batch(
    tiny_base: TinyBase, data: Path, tmp_path: Path
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    more = ["--max-steps", "3", "--eval-split", "0", "--eval-data", str(data)]
    subprocess.run(
        command(*flags(tiny_base("llama"), data, one, *more, "--per-device-train-batch-size", "8")),
        env=environment(),
        check=True,
    )
    # Not --cpu: accelerate then starts one process, whatever --num_processes says.
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    argv = flags(tiny_base("llama"), data, two, *more)
    found = subprocess.run(
        [command()[0], *launch, *command()[1:], *argv],
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stderr
    print(found.stderr)
    assert found.stdout.count("held_out_loss") == 1
    left, right = tensors(one), tensors(two)
    for name, value in left.items():
        torch.testing.assert_close(right[name], value, rtol=1e-3, atol=1e-5)
    facts = [json.loads((p / "train.json").read_text()) for p in (one, two)]
    assert [f["processes"] for f in facts] == [1, 2]
    for score, value in facts[0]["scores"].items():
        assert facts[1]["scores"][score] == pytest.approx(value, rel=1e-3)


@pytest.mark.parametrize("method", ["curlora", "secura", "lora", "full"])
def test_the_activations_are_estimated(tiny_base: TinyBase, data: Path, method: str) -> None:
    """Against what autograd really keeps for the backward pass."""
    argv = flags(tiny_base("llama"), data, Path("unused"), "--method", method, "--dtype", "float32")
    if method == "full":
        argv = [a for a in argv if a not in ("--rank", "8")]
    tuned = prepare(settings(argv))
    rows = encode(read_jsonl(data), tuned.tokenizer, 512)[:4]
    own = {t.untyped_storage().data_ptr() for t in tuned.model.parameters()}
    kept: dict[int, int] = {}

    def note(value: torch.Tensor) -> torch.Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(note, lambda value: value):
        loss = summed_cross_entropy(*answer_logits(tuned.model, Collator(0)(rows)))
    found = estimate(tuned, rows)
    assert loss.requires_grad and 0.6 < found.activations / sum(kept.values()) < 2
    trained = sum(p.numel() for p in tuned.model.parameters() if p.requires_grad)
    assert found.training == 12 * trained
