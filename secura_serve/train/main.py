"""``secura-train``: flags -> settings -> one call."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from secura_serve.command import CommandParser, run_command
from secura_serve.config import add_flags, build, current_names
from secura_serve.errors import TrainingError
from secura_serve.system.os_errors import described
from secura_serve.train.continual.config import SequenceConfig
from secura_serve.train.output.checkpoints import is_main_process
from secura_serve.train.recipe import SEQUENCE_ONLY, parse_changes, read_recipe
from secura_serve.train.settings import REPRODUCTION_ONLY, TrainConfig

__all__ = ["main", "parser"]

_EXAMPLES = """examples:
  secura-train --base smollm2-135m --data mine.jsonl --out adapters/mine --eval-split 0.1
  secura-train --config recipe.yaml --set learning_rate=0.002 --seed 1 --out adapters/mine-1
  secura-train --config adapters/mine/train.json --data mine.jsonl --method lora --out lora/mine
  secura-train --base gpt2-large --tasks mrpc,sst2 --tasks-dir data --strategy er --out adapters/two
  accelerate launch --multi_gpu --num_processes 2 -m secura_serve.train.main --config recipe.yaml
"""


def parser() -> argparse.ArgumentParser:
    """Return the command line of ``secura-train``."""
    command = CommandParser(
        "secura-train",
        description="Train a CUR adapter, a LoRA or DoRA adapter, or all weights of a model.",
        epilog=_EXAMPLES,
    )
    command.add_argument(
        "--config", help="YAML or JSON file with these settings, or a train.json; flags win over it"
    )
    command.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="one setting, its value read as YAML; wins over --config, flags win over it",
    )
    add_flags(command, TrainConfig)
    group = command.add_argument_group(
        "several tasks, one after another", "only with --tasks, in place of --data and --eval-data"
    )
    add_flags(group, SequenceConfig, skip={item.name for item in fields(TrainConfig)})
    return command


def settings(argv: Sequence[str] | None) -> TrainConfig:
    """Return the settings of a command line: flags over ``--set`` over the file.

    They are a :class:`SequenceConfig` where one of its own settings is among them.

    Raises:
        ConfigError: with every problem of all three.
    """
    given: dict[str, Any] = vars(parser().parse_args(argv))
    file, changes = given.pop("config"), given.pop("set")
    over = current_names(SequenceConfig, parse_changes(changes)) | given
    recipe = current_names(SequenceConfig, read_recipe(file, over)) if file else {}
    values = recipe | over
    return build(SequenceConfig if values.keys() & SEQUENCE_ONLY else TrainConfig, values)


def _run(argv: list[str]) -> int:
    config = settings(argv)
    # torch and transformers take seconds to import: --help and typing errors must not wait.
    from secura_serve.train.loop.fit import Interrupted
    from secura_serve.train.output.card import REPRODUCTION_NOTE, is_written, write
    from secura_serve.train.run import train

    if config.resume == "auto" and not config.overwrite and is_written(config):
        # So that a job which is started again and again may always say --resume auto.
        _log(f"secura-train: {config.out} is finished, with these settings and data")
        return 0
    try:
        if isinstance(config, SequenceConfig):
            from secura_serve.train.continual import train_sequence, write_sequence

            run, results = train_sequence(config)
            folder = write_sequence(config, run, results)
        else:
            run = train(config)
            folder = write(config, run) if is_main_process() else Path()
    except Interrupted as stop:
        _log(f"\nsecura-train: {stop}; {config.out} was not written")
        if stop.checkpoint:
            _log(f"secura-train: {stop.checkpoint} is whole; --resume auto goes on from there")
        return 130
    except OSError as error:
        raise TrainingError(f"{described(error)}; {config.out} was not written") from error
    if is_main_process():
        scores = ", ".join(f"{name} {value:.4g}" for name, value in run.scores.items())
        print(f"{folder}: {scores}")
        if config.magnorm in REPRODUCTION_ONLY:
            print(REPRODUCTION_NOTE)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status, see :mod:`secura_serve.command`."""
    left = "nothing was written"
    return run_command(
        "secura-train", _run, argv, settings=SequenceConfig, interrupted=left, report=_log
    )


def _log(text: str) -> None:
    if is_main_process():
        print(text, file=sys.stderr)


if __name__ == "__main__":
    raise SystemExit(main())
