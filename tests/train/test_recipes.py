"""Proves that the recipes of the papers are recipes: each parses into what the paper says, and
takes its first steps on a tiny random model of its architecture.

Needs peft, transformers, accelerate and the tiny bases of conftest.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from secura_serve.train.continual.config import SequenceConfig
from secura_serve.train.main import main, settings
from tests.support import ROOT
from tests.support.training import PAIRS, write

RECIPES = sorted((ROOT / "benchmarks" / "recipes").glob("*.yaml"))
# What a tiny model needs otherwise.
SMALL = {
    "per_device_train_batch_size": 2,
    "max_steps": 1,
    "dtype": "float32",
    "device": "cpu",
    "rank": 8,
}


def _arch(recipe: Path) -> str:
    found = re.search("llama|qwen2|gemma2|mistral|gpt2", recipe.stem)
    return found[0] if found else "llama"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Files of every task of every recipe."""
    folder = tmp_path / "data"
    folder.mkdir()
    for task in ("mrpc", "sst2", "sentiment140"):
        for part in ("train", "test"):
            write(folder / f"{task}.{part}.jsonl", PAIRS[:4])
    return folder


def _files(recipe: Path, data: Path) -> list[str]:
    if "tasks" in yaml.safe_load(recipe.read_text()):
        return ["--tasks-dir", str(data)]
    return ["--data", str(data / "mrpc.train.jsonl")]


@pytest.mark.long
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_parses_and_starts(
    tiny_base: Callable[[str], Path], data: Path, tmp_path: Path, recipe: Path
) -> None:
    argv = ["--config", str(recipe), "--out", str(tmp_path / "out"), *_files(recipe, data)]
    asked = settings(argv)
    small = SMALL | {"base": str(tiny_base(_arch(recipe)))}
    if asked.inner_rank:
        small["inner_rank"] = 12
    sets = [part for key, value in small.items() for part in ("--set", f"{key}={value}")]
    assert main([*argv, *sets]) == 0
    facts = json.loads((tmp_path / "out" / "train.json").read_text())
    for name in ("learning_rate", "warmup_steps", "fusion_step"):
        assert facts["config"][name] == getattr(asked, name)
    assert facts["scores"]["steps"] == (3 if isinstance(asked, SequenceConfig) else 1)


def test_the_recipes_say_what_the_papers_say(data: Path) -> None:
    found = {
        path.stem: settings(["--config", str(path), "--out", "o", *_files(path, data)])
        for path in RECIPES
    }
    secura = [c for name, c in found.items() if c.method == "secura"]
    assert len(secura) == 5 == len({c.base for c in secura})
    for c in secura:
        assert (c.rank, c.inner_rank, c.learning_rate, c.fusion_step) == (150, 200, 1e-3, 1)
        assert c.target_modules() == ["q_proj", "v_proj"]
    for model, batch, longest in (("mistral-7b", 8, 512), ("gpt2-large", 32, 256)):
        ours, lora = found[f"curlora-{model}"], found[f"curlora-baseline-lora-{model}"]
        for c in (ours, lora):
            assert isinstance(c, SequenceConfig) and c.strategy == "seq"
            assert [t.name for t in c.task_list()] == ["mrpc", "sst2", "sentiment140"]
            assert (c.learning_rate, c.warmup_steps, c.num_train_epochs) == (2.5e-4, 500, 3)
            assert (c.per_device_train_batch_size, c.max_length) == (batch, longest)
            assert (c.lr_scheduler_type, c.rank) == ("cosine", 16)
            assert c.targets == ours.targets and c.base == ours.base
        assert ours.alpha == "1"
