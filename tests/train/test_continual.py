"""Proves the training on task after task: what each strategy computes, against loops and hand
computations in float64, and that a sequence killed between tasks ends in the same numbers.

Needs peft, transformers, accelerate and a tiny base of conftest.py; a process is really killed.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from secura_serve import adapter
from secura_serve.errors import ConfigError, DataError
from secura_serve.train.continual import train_sequence, write_sequence
from secura_serve.train.continual.config import SequenceConfig
from secura_serve.train.continual.metrics import AccuracyMatrix
from secura_serve.train.continual.stages import StageFolder
from secura_serve.train.continual.strategies.er import Replay, Reservoir
from secura_serve.train.continual.strategies.ewc import EWC, fisher_diagonal
from secura_serve.train.continual.strategies.ilora import ILoRA
from secura_serve.train.data import Collator, encode
from secura_serve.train.data.records import read_jsonl
from secura_serve.train.loop.fit import Interrupted
from secura_serve.train.loop.loss import answer_logits, score_rows
from secura_serve.train.main import main, settings
from secura_serve.train.methods import checkpoint_tensors, prepare
from tests.support.training import PAIRS, command, environment, flags, same, tensors, write

TinyBase = Callable[[str], Path]


@dataclass
class _Output:
    logits: Tensor


class Two(nn.Module):
    """Two parameters, three words: the logits after word w are (a·w, b·w², 0)."""

    def __init__(self, a: float, b: float) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.tensor(a)), nn.Parameter(torch.tensor(b))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool) -> _Output:
        w = input_ids.float()
        return _Output(torch.stack([self.a * w, self.b * w * w, torch.zeros_like(w)], -1))


def _score(a: float, b: float, ids: list[int], labels: list[int]) -> tuple[float, float]:
    """∂ log p / ∂a and ∂b of one row, by hand: Σ_t (1[y_t = word] − p(word)) · ∂z/∂θ."""
    da = db = 0.0
    for w, y in zip(ids, labels[1:], strict=False):
        if y == -100:
            continue
        z = [a * w, b * w * w, 0.0]
        total = sum(math.exp(v) for v in z)
        da += ((y == 0) - math.exp(z[0]) / total) * w
        db += ((y == 1) - math.exp(z[1]) / total) * w * w
    return da, db


ROWS = [
    {"input_ids": [2, 1, 0], "labels": [-100, 1, 0]},
    {"input_ids": [1, 2, 1, 2], "labels": [-100, -100, 1, 2]},
    {"input_ids": [2, 2], "labels": [-100, 2]},
]


def test_fisher_and_penalty_are_those_worked_by_hand() -> None:
    a, b, weight = 0.3, -0.2, 5.0
    model, collate = Two(a, b), Collator(0)
    grads = [_score(a, b, row["input_ids"], row["labels"]) for row in ROWS]
    by_hand = [sum(g[i] ** 2 for g in grads) / len(grads) for i in (0, 1)]
    found = fisher_diagonal(model, ROWS, collate)
    assert [float(found["a"]), float(found["b"])] == pytest.approx(by_hand, rel=1e-5)

    ewc = EWC(model, collate, weight, samples=10, seed=0)
    none = torch.zeros(())
    assert float(ewc.extra_loss(model, {}, none)) == 0
    ewc.finish(ROWS)
    stops, fishers = [(a, b)], [by_hand]
    move = (0.7, 0.1)
    with torch.no_grad():
        model.a.fill_(move[0])
        model.b.fill_(move[1])
    expected = weight / 2 * sum(by_hand[i] * (move[i] - stops[0][i]) ** 2 for i in (0, 1))
    assert ewc.extra_loss(model, {}, none).item() == pytest.approx(expected, rel=1e-5)

    # A second task: the sum of both penalties, up to a constant. So compare differences and slopes.
    ewc.finish(ROWS[:1])
    stops.append(move)
    fishers.append([g**2 for g in _score(*move, ROWS[0]["input_ids"], ROWS[0]["labels"])])

    def both(at: tuple[float, float]) -> float:
        return (
            weight
            / 2
            * sum(
                F_k[i] * (at[i] - stop[i]) ** 2
                for F_k, stop in zip(fishers, stops, strict=True)
                for i in (0, 1)
            )
        )

    def ours(at: tuple[float, float]) -> float:
        with torch.no_grad():
            model.a.fill_(at[0])
            model.b.fill_(at[1])
        return ewc.extra_loss(model, {}, none).item()

    points = [(0.5, 0.5), (-1.0, 0.2), (0.1, -0.7)]
    zero = ours((0.0, 0.0)), both((0.0, 0.0))
    for at in points:
        assert ours(at) - zero[0] == pytest.approx(both(at) - zero[1], rel=1e-4)
    again = EWC(model, collate, weight, samples=10, seed=0)
    again.load(ewc.tensors(), {})
    assert all(again.extra_loss(model, {}, none) == ewc.extra_loss(model, {}, none) for _ in [0])


def _numbered(n: int, start: int = 0) -> list[dict[str, list[int]]]:
    return [{"input_ids": [i], "labels": [i]} for i in range(start, start + n)]


def test_a_reservoir_keeps_every_row_alike() -> None:
    counts: Counter[int] = Counter()
    for seed in range(400):
        kept = Reservoir(10, seed)
        kept.offer(_numbered(30))
        kept.offer(_numbered(10, 30))
        ids = [row["input_ids"][0] for row in kept.rows]
        assert len(set(ids)) == 10 and kept.seen == 40
        counts.update(ids)
    # 400 draws of 10 in 40: 100 each, standard deviation 8.7.
    assert len(counts) == 40 and all(65 < count < 135 for count in counts.values())


def test_replay_has_its_share_and_goes_on_alike_after_a_load() -> None:
    first, second = _numbered(50), _numbered(40, 100)
    er = Replay(20, 0.25, seed=3)
    assert er.rows(first) == first
    er.finish(first)
    rows = er.rows(second)
    assert rows[:40] == second and len(rows) == 50
    replayed = rows[40:]
    assert all("replayed" in row and row["input_ids"][0] < 50 for row in replayed)
    assert len({row["input_ids"][0] for row in replayed}) == 10
    other = Replay(20, 0.25, seed=3)
    other.load({}, json.loads(json.dumps(er.facts())))
    for one in (er, other):
        one.finish(second)
    assert er.facts() == other.facts() and er.rows(first) == other.rows(first)
    assert Replay(20, 0.25, seed=4).buffer.seed != er.buffer.seed


def test_the_slow_copy_is_a_moving_average() -> None:
    model = Two(1.0, -2.0)
    copy = ILoRA(model, 5, 0.2, seed=0, decay=0.9, weight=1.0)
    by_hand = [1.0, -2.0]
    for step in range(7):
        with torch.no_grad():
            model.a.add_(0.5)
            model.b.mul_(1.1)
        copy.follow()
        now = [1.0 + 0.5 * (step + 1), -2.0 * 1.1 ** (step + 1)]
        by_hand = [0.9 * s + 0.1 * v for s, v in zip(by_hand, now, strict=True)]
    assert [float(copy.slow[n]) for n in "ab"] == pytest.approx(by_hand, rel=1e-6)
    assert model.a.item() == 4.5


def test_the_distance_is_between_the_logits_of_replayed_rows() -> None:
    model, gamma = Two(0.4, 0.1), 0.99
    copy = ILoRA(model, 5, 0.2, seed=0, decay=0.9, weight=gamma)
    with torch.no_grad():
        model.a.fill_(0.9)
        model.b.fill_(-0.3)
    marked = [ROWS[0], ROWS[1] | {"replayed": [1]}, ROWS[2] | {"replayed": [1]}]
    batch = Collator(0)(marked)
    logits, _ = answer_logits(model, batch)
    found = copy.extra_loss(model, batch, logits)
    # Words before the labels of the two marked rows.
    squares = [v for w in (2, 1, 2) for v in (((0.9 - 0.4) * w) ** 2, (-0.4 * w * w) ** 2, 0.0)]
    assert found.item() == pytest.approx(gamma * sum(squares) / len(squares), rel=1e-5)
    # d/da of the same, the slow copy being a constant.
    found.backward()
    slope = gamma * sum(2 * (0.9 - 0.4) * w * w for w in (2, 1, 2)) / len(squares)
    assert float(model.a.grad) == pytest.approx(slope, rel=1e-5)
    plain = Collator(0)(ROWS)
    assert "replayed" not in plain
    assert float(copy.extra_loss(model, plain, answer_logits(model, plain)[0])) == 0


def test_measures_by_hand() -> None:
    matrix = AccuracyMatrix(
        ("a", "b", "c"),
        ((0.9, 0.3, 0.2), (0.8, 0.7, 0.4), (0.85, 0.5, 0.6)),
        (0.5, 0.25, 0.1),
    )
    assert matrix.average_accuracy == pytest.approx((0.85 + 0.5 + 0.6) / 3)
    assert matrix.backward_transfer == pytest.approx(((0.85 - 0.9) + (0.5 - 0.7)) / 2)
    assert matrix.forgetting == pytest.approx(((0.9 - 0.85) + (0.7 - 0.5)) / 2)
    assert matrix.forward_transfer == pytest.approx(((0.3 - 0.25) + (0.4 - 0.1)) / 2)
    assert AccuracyMatrix(("a",), ((0.5,),)).backward_transfer is None
    with pytest.raises(DataError, match="2 tasks needs 2 rows"):
        AccuracyMatrix(("a", "b"), ((0.5, 0.5),))


def test_exact_match_is_that_of_greedy_decoding(tiny_base: TinyBase, tmp_path: Path) -> None:
    file = write(tmp_path / "x.jsonl", PAIRS)
    config = settings(flags(tiny_base("llama"), file, tmp_path / "o"))
    tuned = prepare(config)
    model, tokenizer = tuned.model.eval(), tuned.tokenizer
    rows = encode(read_jsonl(file), tokenizer, 512)[:4]
    # Two rows that the model answers so itself, and two that it does not.
    for row in rows[:2]:
        prompt = [i for i, y in zip(row["input_ids"], row["labels"], strict=True) if y == -100]
        greedy = model.generate(
            input_ids=torch.tensor([prompt]), max_new_tokens=4, do_sample=False, pad_token_id=0
        )[0].tolist()
        row |= {"input_ids": greedy, "labels": [-100] * len(prompt) + greedy[len(prompt) :]}
    found = score_rows(model, rows, Collator(tokenizer.pad_token_id), 4)
    assert found["exact_match"] == 0.5 and 0.5 < found["token_accuracy"] < 1


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two tasks that contradict each other."""
    made = tmp_path / "data"
    made.mkdir()
    for name, word in (("sums", ""), ("words", "no ")):
        rows = [row | {"completion": word + row["completion"]} for row in PAIRS]
        write(made / f"{name}.train.jsonl", rows[:12])
        write(made / f"{name}.test.jsonl", rows[12:])
    return made


def _argv(base: Path, folder: Path, out: Path, *more: str) -> list[str]:
    argv = flags(base, Path("-"), out, "--eval-split", "0", "--max-steps", "3", *more)
    del argv[argv.index("--data") : argv.index("--data") + 2]
    if "full" in more:
        del argv[argv.index("--rank") : argv.index("--rank") + 2]
    return [*argv, "--tasks", "sums,words", "--tasks-dir", str(folder)]


SEQUENCES = [
    ("full", "seq", ["--learning-rate", "0.001"]),
    ("dora", "er", ["--replay", "6", "--replay-share", "0.5"]),
    ("lora", "ewc", ["--ewc-lambda", "10"]),
    ("secura", "ilora", ["--ema-decay", "0.5", "--replay-share", "1"]),
]


class Killed(Exception):
    pass


@pytest.mark.long
@pytest.mark.parametrize(("method", "strategy", "more"), SEQUENCES)
def test_a_sequence_stopped_between_tasks_ends_in_the_same_numbers(
    tiny_base: TinyBase,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    strategy: str,
    more: list[str],
) -> None:
    base, whole, parts = tiny_base("llama"), tmp_path / "whole", tmp_path / "parts"
    more = ["--method", method, "--strategy", strategy, *more]
    assert main(_argv(base, folder, whole, *more)) == 0
    found = json.loads((whole / "continual.json").read_text())
    scores = found["matrix"]["token_accuracy"]
    assert len(scores) == 2 == len(scores[0]) and len(found["untrained"]["loss"]) == 2
    assert found["stages"][1]["replayed"] == {"er": 6, "ilora": 12}.get(strategy, 0)
    assert {"average_accuracy", "backward_transfer", "forgetting"} <= found.keys()
    # Something was learned, also by the slow copy.
    assert found["matrix"]["loss"][0][0] < found["untrained"]["loss"][0]
    assert "| after | sums | words |" in (whole / "README.md").read_text()
    assert not (tmp_path / ".whole.run").exists()

    argv, done = _argv(base, folder, parts, *more), StageFolder.write

    def last_words(self: StageFolder, *args: Any, **kwargs: Any) -> None:
        done(self, *args, **kwargs)
        raise Killed

    monkeypatch.setattr(StageFolder, "write", last_words)
    with pytest.raises(Killed):
        main(argv)
    monkeypatch.undo()
    assert not parts.exists()
    assert main(argv) == 2 and main([*argv, "--resume", "auto", "--learning-rate", "0.5"]) == 2
    assert main([*argv, "--resume", "auto"]) == 0
    assert same(whole, parts)
    again = json.loads((parts / "continual.json").read_text())
    assert again["matrix"] == found["matrix"] and again["untrained"] == found["untrained"]


@pytest.mark.long
def test_a_killed_process_goes_on_and_stages_are_kept(
    tiny_base: TinyBase, folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "two"
    more = ["--strategy", "er", "--keep-stages", "--max-steps", "2", "--score", "token_accuracy"]
    argv = _argv(tiny_base("llama"), folder, out, *more)
    code = (
        "import os, sys, secura_serve.train.continual.stages as s; w = s.StageFolder.write;"
        "s.StageFolder.write = lambda *a, **k: (w(*a, **k), os.kill(os.getpid(), 9));"
        "from secura_serve.train.main import main; main(sys.argv[1:])"
    )
    killed = subprocess.run([*command()[:1], "-c", code, *argv], env=environment())
    assert killed.returncode == -signal.SIGKILL and not out.exists()
    assert main([*argv, "--resume", "auto"]) == 0
    stages = [tmp_path / "two-1-sums", tmp_path / "two-2-words"]
    assert all(adapter.load(stage).modules for stage in stages)
    assert same(stages[1], out) and not same(stages[0], out)
    assert json.loads((out / "continual.json").read_text())["accuracy"] == "token_accuracy"
    # The recipe of a sequence trains it again.
    again = ["--config", str(out / "train.json"), "--base", str(tiny_base("llama"))]
    again += ["--tasks", "sums,words", "--tasks-dir", str(folder), "--out", str(tmp_path / "b")]
    assert main([*again, "--no-keep-stages"]) == 0
    assert same(out, tmp_path / "b")


class _CtrlC(TrainerCallback):
    """Presses it in the second task."""

    def __init__(self) -> None:
        self.tasks = 0

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.tasks += 1

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        if self.tasks == 2:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.long
def test_an_interrupted_task_leaves_the_finished_ones(
    tiny_base: TinyBase, folder: Path, tmp_path: Path
) -> None:
    """With early stopping on examples held out of the training files."""
    more = ["--eval-split", "0.25", "--eval-steps", "1", "--patience", "2"]
    argv = _argv(tiny_base("llama"), folder, tmp_path / "o", *more)
    config = settings(argv)
    assert isinstance(config, SequenceConfig)
    with pytest.raises(Interrupted, match="step 1 of 3") as stop:
        train_sequence(config, callbacks=[_CtrlC()])
    assert stop.value.checkpoint == tmp_path / ".o.run" / "stage"
    assert main([*argv, "--resume", "auto"]) == 0
    stages = json.loads((tmp_path / "o" / "continual.json").read_text())["stages"]
    assert [stage["task"] for stage in stages] == ["sums", "words"]
    assert [stage["examples"] for stage in stages] == [9, 9]


@pytest.mark.long
def test_what_is_written_is_the_slow_copy(
    tiny_base: TinyBase, folder: Path, tmp_path: Path
) -> None:
    more = ["--strategy", "ilora", "--ema-decay", "0"]
    results = []
    for decay in ("0", "0.9"):
        more[-1] = decay
        config = settings(_argv(tiny_base("llama"), folder, tmp_path / decay, *more))
        assert isinstance(config, SequenceConfig)
        asked = []

        def scorer(tuned: Any, task: str, rows: Any, asked: list[Any] = asked) -> dict[str, float]:
            held = checkpoint_tensors(tuned.model).items()
            asked.append({n: t.detach().clone() for n, t in held if n.endswith("secura_U.default")})
            return {"exact_match": 0.5}

        run, stage_results = train_sequence(config, scorer=scorer)
        assert len(asked) == 6 and stage_results.summary()["average_accuracy"] == 0.5
        now = checkpoint_tensors(run.model)
        assert all(torch.equal(now[name], value) for name, value in asked[-1].items())
        write_sequence(config, run, stage_results)
        results.append(sum(float(t.norm()) for t in asked[-1].values()))
    # With decay 0 the copy is the trained adapter, with 0.9 it has moved less.
    assert 0 < results[1] < 0.8 * results[0]
    assert not same(tmp_path / "0", tmp_path / "0.9")
    assert all(float(t.abs().max()) > 0 for n, t in tensors(tmp_path / "0.9").items() if "U" in n)


@pytest.mark.parametrize("method", ["curlora", "secura", "lora", "dora", "full"])
def test_the_slow_copy_answers_as_the_model_would(
    tiny_base: TinyBase, tmp_path: Path, method: str
) -> None:
    """Its logits come from the same modules with other tensors, whatever the method."""
    more = ["--method", method] + ([] if method == "full" else ["--rank", "4"])
    argv = ["--base", str(tiny_base("qwen2")), "--data", "-", "--out", "o", "--dtype", "float32"]
    tuned = prepare(settings([*argv, "--device", "cpu", *more]))
    model = tuned.model
    rows = encode(read_jsonl(write(tmp_path / "x.jsonl", PAIRS[:3])), tuned.tokenizer, 512)
    batch = Collator(tuned.tokenizer.pad_token_id)([row | {"replayed": [1]} for row in rows])
    held = {n: p for n, p in model.named_parameters() if p.requires_grad}
    for value in held.values():
        value.data += 0.05 * torch.randn(value.shape, generator=torch.Generator().manual_seed(0))
    copy = ILoRA(model, 5, 0.2, seed=0, decay=0.9, weight=2.0)
    before, wanted = answer_logits(model, batch)
    assert copy.extra_loss(model, batch, before).item() < 1e-9
    for value in held.values():
        value.data *= 1.2
    now, _ = answer_logits(model, batch)
    expected = 2 * (now - before)[wanted != -100].double().square().mean()
    found = copy.extra_loss(model, batch, now)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5) and found > 0
    found.backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in held.values())


@pytest.mark.long
def test_ewc_holds_what_the_first_task_needs(
    tiny_base: TinyBase, folder: Path, tmp_path: Path
) -> None:
    moved = []
    for weight in ("1e-6", "1e4"):
        more = ["--strategy", "ewc", "--ewc-lambda", weight, "--max-steps", "15"]
        more += ["--learning-rate", "0.003"]
        config = settings(_argv(tiny_base("llama"), folder, tmp_path / weight, *more))
        assert isinstance(config, SequenceConfig)
        seen: list[dict[str, Tensor]] = []

        def scorer(tuned: Any, task: str, rows: Any, seen: list[Any] = seen) -> dict[str, float]:
            held = tuned.model.named_parameters()
            seen.append({n: p.detach().clone() for n, p in held if p.requires_grad})
            return {"exact_match": 0.0}

        train_sequence(config, scorer=scorer)
        # Asked twice before the first task and twice after each.
        after = seen[2], seen[4]
        moved.append(sum(float((after[1][n] - after[0][n]).norm()) for n in after[0]))
        for path in tmp_path.glob(".*.run"):
            shutil.rmtree(path)
    assert 0 < moved[1] < 0.5 * moved[0]


def test_what_a_sequence_refuses(folder: Path, tmp_path: Path) -> None:
    def refused(*more: str) -> str:
        with pytest.raises(ConfigError) as caught:
            settings(["--base", "b", "--out", "o", *more])
        return "\n".join(caught.value.problems)

    assert "tasks: missing" in refused("--strategy", "er")
    tasks = ["--tasks", "sums,words", "--tasks-dir", str(folder)]
    text = refused(*tasks, "--ewc-lambda", "3", "--data", "x", "--replay-share", "0")
    for part in (
        "ewc_lambda: not supported by strategy seq",
        "data: not with --tasks",
        "replay_share: got 0.0",
    ):
        assert part in text
    text = refused("--tasks", "sums,a=b,../x=y:z,more=sums", "--tasks-dir", str(folder))
    for part in ("'a=b', must be NAME=TRAIN:TEST", "name '../x'", "no file y"):
        assert part in text
    assert "names no files" in refused("--tasks", "sums")
    assert "sums is named twice" in refused("--tasks", "sums,sums", "--tasks-dir", str(folder))
    assert "none is named" in refused("--tasks", ",")
    text = refused(*tasks, "--strategy", "ilora", "--packing", "--eval-split", "0.2")
    assert "packing: not with strategy ilora" in text
    text = refused(*tasks, "--strategy", "ewc", "--method", "secura", "--fusion-step", "2")
    assert "fusion_step: not with strategy ewc" in text
    bad = write(tmp_path / "bad.jsonl", [{"prompt": 1}])
    config = settings(
        ["--base", "b", "--out", str(tmp_path / "o"), "--tasks", f"a={bad}:{bad},b={bad}:{bad}"]
    )
    assert isinstance(config, SequenceConfig)
    with pytest.raises(DataError) as caught:
        train_sequence(config)
    assert {p.split(":")[0] for p in caught.value.problems} == {"a", "b"}
