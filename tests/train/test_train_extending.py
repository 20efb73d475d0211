"""Proves that training is extended from outside the package: a strategy and a method that a test
registers are trained like our own, and an unknown name is refused with the allowed ones. Also that
settings under the names of earlier versions are still read, from flags and from files.

Needs peft, transformers, accelerate and the tiny bases of conftest.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from secura_serve.config import build
from secura_serve.errors import ConfigError
from secura_serve.train import (
    Method,
    SequenceConfig,
    Strategy,
    TrainConfig,
    register_method,
    register_strategy,
)
from secura_serve.train.continual.strategies import STRATEGIES, get_strategy
from secura_serve.train.main import main, settings
from secura_serve.train.methods import METHODS
from tests.support.training import PAIRS, flags, same, tensors, write

TinyBase = Callable[[str], Path]


class _Replaying(Strategy):
    """Trains on the last task's first row again, and remembers how many rows it has seen."""

    def __init__(self, times: int) -> None:
        self.times, self.seen, self.kept = times, 0, []

    @classmethod
    def from_config(cls, config: Any, prepared: Any) -> _Replaying:
        assert config.strategy == "toy" and prepared.tokenizer is not None
        return cls(config.replay)

    def rows(self, new: Any) -> Any:
        return [*new, *self.kept * self.times]

    def finish(self, new: Any) -> None:
        self.seen, self.kept = self.seen + len(new), new[:1]

    def facts(self) -> dict[str, Any]:
        return {"seen": self.seen, "kept": self.kept}

    def load(self, tensors: Any, facts: Any) -> None:
        self.seen, self.kept = facts["seen"], facts["kept"]


@pytest.fixture
def clean_registries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget what a test registers."""
    for registry in (STRATEGIES, METHODS):
        monkeypatch.setattr(registry, "_entries", dict(registry))


def _tasks(folder: Path) -> list[str]:
    for name, rows in (("one", PAIRS[:4]), ("two", PAIRS[4:8])):
        for part in ("train", "test"):
            write(folder / f"{name}.{part}.jsonl", rows)
    return ["--tasks", "one,two", "--tasks-dir", str(folder), "--eval-split", "0"]


def _sequence_argv(base: Path, folder: Path, out: Path, *more: str) -> list[str]:
    argv = flags(base, Path("unused"), out, *_tasks(folder), "--max-steps", "2", *more)
    at = argv.index("--data")
    return argv[:at] + argv[at + 2 :]


@pytest.mark.long
def test_a_strategy_from_outside_is_trained_like_our_own(
    clean_registries: None, tiny_base: TinyBase, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="strategy: got 'toy', allowed: seq, "):
        settings(["--strategy", "toy"])
    register_strategy(
        "toy",
        _Replaying,
        summary="the last task's first row again",
        settings=("replay",),
        conflicts={"packing": "rows repeat"},
    )
    assert get_strategy("toy") is _Replaying
    argv = _sequence_argv(tiny_base("llama"), tmp_path, tmp_path / "o", "--strategy", "toy")
    assert main([*argv, "--replay", "3"]) == 0
    found = json.loads((tmp_path / "o" / "continual.json").read_text())
    assert [stage["replayed"] for stage in found["stages"]] == [0, 3]
    assert found["config"]["strategy"] == "toy" and found["config"]["replay"] == 3
    with pytest.raises(ConfigError, match="packing: not with strategy toy: rows repeat"):
        settings([*argv, "--packing"])
    with pytest.raises(ConfigError, match="replay_share: not supported by strategy toy"):
        settings([*argv, "--replay-share", "0.5"])
    with pytest.raises(ConfigError, match="strategy 'toy' is registered already"):
        register_strategy("toy", Strategy, summary="")


def test_a_method_from_outside_is_trained_like_our_own(
    clean_registries: None, tiny_base: TinyBase, tmp_path: Path
) -> None:
    def peft_config(config: TrainConfig, common: dict[str, Any]) -> Any:
        from peft import IA3Config

        for name in ("r", "layers_to_transform", "layers_pattern"):
            common.pop(name)
        return IA3Config(**common | {"feedforward_modules": []})

    register_method(
        "toy",
        Method(
            summary="PEFT's IA3",
            describe=lambda settings, base: f"An IA3 adapter for `{base}`",
            peft_config=peft_config,
            settings=frozenset({"targets", "exclude"}),
            defaults={"learning_rate": 0.5},
            tags=("ia3",),
        ),
    )
    data, out = write(tmp_path / "d.jsonl", PAIRS), tmp_path / "ia3"
    argv = flags(tiny_base("llama"), data, out, "--method", "toy", "--targets", "k_proj,v_proj")
    at = argv.index("--rank")
    assert main(argv[:at] + argv[at + 2 :]) == 0
    assert all("ia3" in name for name in tensors(out))
    card = (out / "README.md").read_text()
    assert "tags: [ia3]" in card and "An IA3 adapter for" in card
    with pytest.raises(ConfigError, match="rank: not supported by method toy"):
        settings(argv)


def test_an_unknown_name_is_refused_with_the_allowed_ones(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown strategy 'sqe'; allowed: seq, er, ewc, ilora"):
        get_strategy("sqe")
    with pytest.raises(ConfigError, match="unknown method 'lroa'; allowed: curlora, secura, lora"):
        METHODS["lroa"]
    good = {"base": "b", "data": "d", "out": "o"}
    with pytest.raises(ConfigError, match="unknown method 'lroa'; allowed: curlora"):
        TrainConfig(**good, method="lroa")
    with pytest.raises(ConfigError, match="method: got 'lroa', allowed: curlora"):
        build(TrainConfig, good | {"method": "lroa"})
    with pytest.raises(ConfigError, match="unknown strategy 'sqe'; allowed: seq, er"):
        SequenceConfig(base="b", out="o", tasks="a=x:y", strategy="sqe")


OLD = {"lr": 0.5, "batch_size": 2, "epochs": 3.0, "accumulate": 4, "warmup": 7.0}
OLD |= {"schedule": "linear"}
NEW = {
    "learning_rate": 0.5, "per_device_train_batch_size": 2, "num_train_epochs": 3.0,
    "gradient_accumulation_steps": 4, "warmup_steps": 7.0, "lr_scheduler_type": "linear",
}  # fmt: skip


def test_old_names_are_read_with_a_notice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = {"base": "b", "data": "d", "out": "o"}
    file = tmp_path / "train.json"
    file.write_text(json.dumps({"config": good | OLD | {"accumulation": "m2"}}))
    argv = [part for key, value in (good | OLD).items()
            for part in (f"--{key.replace('_', '-')}", str(value))]  # fmt: skip
    sets = [part for key, value in OLD.items() for part in ("--set", f"{key}={value}")]
    given = [part for key, value in good.items() for part in (f"--{key}", value)]
    for way in (argv, ["--config", str(file)], [*given, *sets]):
        config = settings(way)
        assert NEW.items() <= vars(config).items()
        told = capsys.readouterr().err
        for old, new in zip(OLD, ("learning_rate", "per_device_train_batch_size"), strict=False):
            assert old.replace("_", "-") in told or old in told
            assert new.replace("_", "-") in told or new in told
    settings(["--config", str(file)])
    assert "accumulation is ignored" in capsys.readouterr().err
    # A new flag wins over an old name in the file.
    config = settings(["--config", str(file), "--learning-rate", "0.25"])
    assert config.learning_rate == 0.25
    assert settings(["--config", str(file), "--lr", "0.25"]).learning_rate == 0.25


@pytest.mark.long
def test_a_run_of_an_earlier_version_is_resumed(tiny_base: TinyBase, tmp_path: Path) -> None:
    """Its run.json has the settings under their old names."""
    data = write(tmp_path / "d.jsonl", PAIRS)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    more = ["--run-dir", str(tmp_path / "run"), "--save-steps", "2"]
    assert main(flags(tiny_base("llama"), data, whole, *more)) == 0
    file = tmp_path / "run" / "run.json"
    facts = json.loads(file.read_text())
    old = dict(zip(NEW, OLD, strict=True))
    facts = {old.get(key, key): value for key, value in facts.items()} | {"accumulation": "m1"}
    assert set(OLD) < set(facts) and not set(NEW) & set(facts)
    file.write_text(json.dumps(facts))
    assert main(flags(tiny_base("llama"), data, parts, *more, "--resume", "auto")) == 0
    assert same(whole, parts)
