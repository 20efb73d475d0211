"""Proves secura-train end to end on a tiny random base: an adapter folder that loads, learns its
data, is the same again for the same seed and says how it was made; and that bad data and bad
settings are refused with file, line and field.

Needs peft, transformers and the tiny base of conftest.py.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from secura_serve import adapter
from secura_serve.config import build
from secura_serve.errors import ConfigError, DataError
from secura_serve.train.data import IGNORE, Collator, encode
from secura_serve.train.data.records import digest, read_jsonl
from secura_serve.train.loop.loss import answer_logits, summed_cross_entropy
from secura_serve.train.main import main, parser, settings
from secura_serve.train.settings import TrainConfig
from tests.support import ROOT
from tests.support.training import PAIRS, flags, write

TinyBase = Callable[[str], Path]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write(tmp_path / "sums.jsonl", PAIRS)


@pytest.mark.long
def test_end_to_end(tiny_base: TinyBase, data: Path, tmp_path: Path, capfd: Any) -> None:
    base, out = tiny_base("llama"), tmp_path / "sums"
    assert main(flags(base, data, out)) == 0
    told = capfd.readouterr()
    assert "held_out_token_accuracy" in told.out and "tokens/s" in told.err
    assert re.search(r"memory: about [\d.]+ GiB .*\n(.*\n)*.*memory: [\d.]+ GiB more", told.err)
    found = adapter.load(out)
    assert len(found.modules) == 14 and found.config.r == 8 and found.config.core == "u"
    assert any(cur.U.abs().max() > 0 for cur in found.modules.values())

    facts = json.loads((out / "train.json").read_text())
    assert facts["data_sha256"]["data"] == digest(data)
    assert set(facts["config"]) == {f.name for f in fields(TrainConfig)}
    assert facts["config"]["data"] == "sums.jsonl" and str(tmp_path) not in json.dumps(
        facts["config"] | {"base": ""}
    )
    assert set(facts["alpha_per_module"]) == set(found.modules)
    assert facts["scores"]["steps"] == 6 and "torch" in facts["versions"]
    assert "held_out_loss" in (out / "README.md").read_text()
    assert len(json.loads((out / "curves.json").read_text())["train"]) == 6
    assert {p.name for p in tmp_path.iterdir()} == {"sums", "sums.jsonl"}

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    PeftModel.from_pretrained(model, out)
    assert main(flags(base, data, out)) == 2
    assert "--overwrite" in capfd.readouterr().err

    # The same seed gives the same bytes, from the recipe itself; another seed does not.
    for name, more, same in (("again", [], True), ("other", ["--seed", "1"], False)):
        recipe = ["--config", str(out / "train.json")]
        given = ["--base", str(base), "--data", str(data), "--out", str(tmp_path / name)]
        assert main([*recipe, *given, *more]) == 0
        weights = [
            (tmp_path / n / "adapter_model.safetensors").read_bytes() for n in (name, "sums")
        ]
        assert (weights[0] == weights[1]) is same
        # All but the digest of the weights, which has just been compared byte by byte.
        config = adapter.load(tmp_path / name).config
        assert replace(config, weights_digest=found.config.weights_digest) == found.config


@pytest.mark.long
@pytest.mark.parametrize(
    ("arch", "more"),
    [
        ("qwen2", ["--core", "ab", "--inner-rank", "12", "--init", "svd"]),
        ("gpt2", ["--magnorm", "bounded", "--tau", "0.1", "--targets", "c_attn,c_fc"]),
        ("gemma2", ["--magnorm", "published", "--selection", "lowest_norm", "--alpha", "1"]),
    ],
)
def test_other_models_and_settings(
    tiny_base: TinyBase, data: Path, tmp_path: Path, arch: str, more: list[str]
) -> None:
    out = tmp_path / "task"
    assert main(flags(tiny_base(arch), data, out, "--max-steps", "2", *more)) == 0
    found = adapter.load(out)
    assert found.config.magnorm.mode == (more[1] if more[0] == "--magnorm" else "none")


@pytest.mark.long
def test_training_lowers_the_loss(tiny_base: TinyBase, data: Path, tmp_path: Path) -> None:
    losses = []
    for steps in ("1", "40"):
        out = tmp_path / f"steps-{steps}"
        more = ["--eval-data", str(data), "--max-steps", steps, "--learning-rate", "0.1"]
        assert main(flags(tiny_base("llama"), data, out, *more)) == 0
        losses.append(json.loads((out / "train.json").read_text())["scores"]["held_out_loss"])
    assert losses[1] < 0.8 * losses[0]


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma2"])
def test_the_loss_is_that_of_the_answers_alone(tiny_base: TinyBase, data: Path, arch: str) -> None:
    """Batched, padded and cut to the answers: equal to one plain full forward per example."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_base(arch))
    model = AutoModelForCausalLM.from_pretrained(tiny_base(arch), dtype=torch.float32).eval()
    records = read_jsonl(data)[:3]
    rows = encode(records, tokenizer, 512)
    rows[0]["input_ids"], rows[0]["labels"] = rows[0]["input_ids"][5:], rows[0]["labels"][5:]
    with torch.no_grad():
        logits, labels = answer_logits(model, Collator(tokenizer.pad_token_id)(rows))
        found, count = summed_cross_entropy(logits, labels), (labels != IGNORE).sum()
        wanted = torch.zeros(())
        for row in rows:
            ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
            n = int((labels != IGNORE).sum())
            wanted += n * model(input_ids=ids, labels=labels).loss
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert int(count) == sum(sum(v != IGNORE for v in row["labels"]) for row in rows)


def test_labels_are_the_answer_and_its_end(tiny_base: TinyBase, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_base("llama"))
    turns = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Bye?"},
        {"role": "assistant", "content": "Bye"},
    ]
    file = write(tmp_path / "d.jsonl", [{"messages": turns}, PAIRS[0]])
    for row, answer in zip(encode(read_jsonl(file), tokenizer, 512), ("Bye", "2"), strict=True):
        labels = [v for v in row["labels"] if v != IGNORE]
        assert row["input_ids"][-len(labels) :] == labels
        assert tokenizer.decode(labels) == answer + tokenizer.eos_token


BAD = [
    ("{not json", "bad.jsonl:2: not valid JSON: Expecting property name"),
    ("[1]", "bad.jsonl:2: must be a JSON object"),
    (
        '{"prompt": "a\\ud800", "completion": "c"}',
        r"bad.jsonl:2: field 'prompt' holds '\\ud800', half of a surrogate pair",
    ),
    ('{"prompt": "x"}', "bad.jsonl:2: no field 'completion'; there are 'prompt'"),
    ('{"prompt": 3, "completion": "y"}', "bad.jsonl:2: field 'prompt'"),
    ('{"messages": []}', "bad.jsonl:2: field 'messages'"),
    ('{"messages": [{"role": "user", "content": "x"}]}', "at least two messages"),
    (
        '{"messages": [{"role": "robot", "content": "x"}, {"role": "assistant", "content": "y"}]}',
        r"field 'messages\[0\].role'",
    ),
    (
        '{"messages": [{"role": "user", "content": ""}, {"role": "assistant", "content": "y"}]}',
        r"field 'messages\[0\].content'",
    ),
    (
        '{"messages": [{"role": "assistant", "content": "x"}, {"role": "user", "content": "y"}]}',
        "must end with the assistant",
    ),
]


@pytest.mark.parametrize(("line", "message"), BAD)
def test_bad_data_is_named_by_line_and_field(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text(json.dumps(PAIRS[0]) + "\n" + line + "\n")
    with pytest.raises(DataError, match=message):
        read_jsonl(file)


def test_unusable_files(tiny_base: TinyBase, tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    with pytest.raises(DataError, match="no examples"):
        read_jsonl(empty)
    with pytest.raises(DataError, match="cannot be read"):
        read_jsonl(tmp_path / "none.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="UTF-8"):
        read_jsonl(tmp_path / "latin.jsonl")
    many = write(tmp_path / "many.jsonl", [{"prompt": ""}] * 50)
    with pytest.raises(DataError, match="and 44 more"):
        read_jsonl(many)
    tokenizer = AutoTokenizer.from_pretrained(tiny_base("llama"))
    long = write(tmp_path / "long.jsonl", [{"prompt": "x " * 99, "completion": "y"}])
    with pytest.raises(DataError, match=r"long.jsonl:1: \d+ tokens, --max-length is 50"):
        encode(read_jsonl(long), tokenizer, 50)


GOOD = {"base": "b", "data": "d", "out": "o"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rnak": 3}, "rnak: unknown"),
        ({"rank": "3"}, "rank: got '3', expected int"),
        ({"rank": True}, "rank: got True"),
        ({"rank": 0}, "rank: got 0, must be >= 1"),
        ({"core": "x"}, "core: got 'x', allowed: u, ab"),
        ({"alpha": "fast"}, "alpha: got 'fast'"),
        ({"eval_split": 1.0}, "eval_split"),
        ({"warmup_steps": 1.5}, "warmup_steps: got 1.5, must be a share"),
        ({"inner_rank": 0, "rank": 16}, "inner_rank"),
    ],
)
def test_bad_settings_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(TrainConfig, GOOD | change)
    with pytest.raises(ConfigError, match="data: missing"):
        build(TrainConfig, {})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rnak": 3, "epoch": 1}, "rnak: unknown; did you mean 'rank'"),
        ({"rnak": 3, "num_epochs": 1}, "num_epochs: unknown; did you mean 'num_train_epochs'"),
        ({"qqqq": 3, "zzzz": 4}, "allowed: alpha, base, "),
        ({"lora_alpha": 8}, "lora_alpha: not supported by method curlora"),
        ({"method": "lora", "magnorm": "bounded"}, "magnorm: not supported by method lora"),
        ({"method": "dora", "fusion_step": 2}, "fusion_step: not supported by method dora"),
        ({"method": "full", "rank": 8}, "rank: not supported by method full"),
        ({"fusion_step": 2}, "fusion_step: needs core ab"),
        ({"method": "secura", "dropout": 0.1}, "dropout: needs magnorm none, got bounded"),
        ({"eval_steps": 5}, "eval_steps: give --eval-data"),
        ({"eval_split": 0.1, "patience": 1}, "patience: needs --eval-steps"),
        ({"targets": "(q"}, "targets: not a regular expression"),
        ({"layers": "1-"}, "layers: got '1-'"),
        ({"layers": "1"}, "layers: needs --targets"),
        ({"data_columns": "question"}, "data_columns: got 'question'"),
        ({"method": "full", "dtype": "float16"}, "dtype: full takes"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(
    change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        build(TrainConfig, GOOD | change)


def test_a_method_is_a_set_of_defaults() -> None:
    for given, core, norm in (
        ({}, "u", "none"),
        ({"method": "secura"}, "ab", "bounded"),
        ({"method": "secura", "core": "u", "magnorm": "published"}, "u", "published"),
        ({"core": "ab"}, "ab", "none"),
        ({"method": "lora"}, None, None),
    ):
        config = build(TrainConfig, GOOD | given)
        assert (config.core, config.magnorm) == (core, norm) and config.learning_rate
        assert build(TrainConfig, asdict(config)) == config
    layers = build(TrainConfig, GOOD | {"targets": "q_proj", "layers": "0,3-5"})
    assert layers.layer_numbers() == [0, 3, 4, 5] and layers.target_modules() == ["q_proj"]
    assert build(TrainConfig, GOOD | {"targets": "x.*"}).target_modules() == "x.*"


def test_flags_win_over_set_and_set_over_the_recipe(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "base: b\ndata: d\nout: o\nlearning_rate: 1e-3\nalpha: 0.5\ntargets: [q_proj, v_proj]\n"
        "seed: 1\nrank: 4\nnum_train_epochs: 2\n"
    )
    argv = ["--config", str(recipe), "--set", "seed=2", "--set", "rank=5", "--rank", "6"]
    config = settings([*argv, "--set", "eval-data=null"])
    assert (config.seed, config.rank, config.learning_rate, config.alpha) == (2, 6, 1e-3, "0.5")
    assert config.target_modules() == ["q_proj", "v_proj"] and config.num_train_epochs == 2.0
    with pytest.raises(ConfigError) as caught:
        settings([*argv, "--set", "sede=1", "--set", "learning_rate=fast"])
    assert len(caught.value.problems) == 2 and "'seed'" in caught.value.problems[0]
    with pytest.raises(ConfigError, match="must be KEY=VALUE"):
        settings([*argv, "--set", "seed"])
    recipe.write_text("[1, 2")
    with pytest.raises(ConfigError, match="cannot be read"):
        settings(["--config", str(recipe)])
    recipe.write_text("seed: 1\nseed: 2")
    with pytest.raises(ConfigError, match=r"seed is given twice(.|\n)*recipe.yaml.*line 2"):
        settings(["--config", str(recipe)])
    recipe.write_text("text")
    with pytest.raises(ConfigError, match="must hold a mapping"):
        settings(["--config", str(recipe)])


@pytest.mark.parametrize("recipe", sorted(ROOT.glob("adapters/*/train.json")), ids=str)
def test_the_shipped_recipes_are_still_recipes(recipe: Path) -> None:
    before = json.loads(recipe.read_text())["config"]
    with pytest.raises(ConfigError, match=r"train.json is not complete(.|\n)*give --data FILE"):
        settings(["--config", str(recipe)])
    named = {k: before[k] for k in ("data", "eval_data") if before[k]}
    argv = [part for k, v in named.items() for part in (f"--{k.replace('_', '-')}", v)]
    config = settings(["--config", str(recipe), *argv])
    assert (
        TrainConfig.upgrade(before).items() <= asdict(config).items() and config.method == "curlora"
    )


def test_a_recipe_for_another_method_or_other_data(tmp_path: Path) -> None:
    recipe = tmp_path / "train.json"

    def keep(**given: Any) -> list[str]:
        recipe.write_text(json.dumps({"config": asdict(build(TrainConfig, GOOD | given))}))
        return ["--config", str(recipe)]

    argv = [*keep(rank=7, seed=3, selection_seed=2, learning_rate=0.5), "--data", "d"]
    for method in ("secura", "lora", "dora", "full"):
        config, plain = settings([*argv, "--method", method]), build(TrainConfig, GOOD)
        fresh = build(TrainConfig, GOOD | {"method": method})
        for name in ("core", "magnorm", "learning_rate"):
            assert getattr(config, name) == getattr(fresh, name)
        assert config.seed == 3 and config.rank == (7 if method != "full" else plain.rank)
    assert settings(argv).learning_rate == 0.5
    assert settings([*argv, "--method", "secura"]).selection_seed == 2
    back = settings([*keep(method="lora", lora_alpha=3.0), "--data", "d", "--method", "curlora"])
    assert back.core == "u" and back.lora_alpha is None
    recipe.write_text("base: b\nout: o\ntasks: a,b\ntasks_dir: nowhere\nstrategy: er\nreplay: 9\n")
    assert type(settings(["--config", str(recipe), "--data", "d"])) is TrainConfig


def test_every_setting_is_a_flag_with_help() -> None:
    text = " ".join(parser().format_help().split())
    for item in fields(TrainConfig):
        assert f"--{item.name.replace('_', '-')}" in text
        assert item.metadata["help"] in text
    config = build(TrainConfig, GOOD | {"learning_rate": 1})
    assert config.learning_rate == 1.0 and build(TrainConfig, asdict(config)) == config


def test_help_does_not_wait_for_torch() -> None:
    code = (
        "import sys, secura_serve.train.main as m; m.parser().format_help(); "
        "sys.exit(any(n in sys.modules for n in ('torch', 'transformers', 'peft')))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
