"""``secura-train``: parse -> config -> one call."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from secura_serve.config import TrainConfig, add_flags, build
from secura_serve.errors import ConfigError, SecuraError

__all__ = ["main", "parser"]

_EXAMPLES = """examples:
  secura-train --base smollm2-135m --data mine.jsonl --out adapters/mine --eval-split 0.1
  secura-train --config recipe.json --seed 1 --out adapters/mine-1
"""


def parser() -> argparse.ArgumentParser:
    """The command line of ``secura-train``."""
    made = argparse.ArgumentParser(
        prog="secura-train",
        description="Train a CUR adapter on a JSONL file and write it as an adapter folder.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument("--config", help="JSON file with these settings; flags win over it")
    add_flags(made, TrainConfig)
    return made


def _settings(argv: Sequence[str] | None) -> TrainConfig:
    given: dict[str, Any] = vars(parser().parse_args(argv))
    file = given.pop("config")
    values: dict[str, Any] = {}
    if file:
        try:
            values = json.loads(Path(file).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"--config {file} cannot be read: {error}") from error
        if not isinstance(values, dict):
            raise ConfigError(f"--config {file} must hold a JSON object")
        # A train.json is a recipe too.
        values = values.get("config", values)
    return build(TrainConfig, values | given)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    try:
        config = _settings(argv)
        # torch and transformers take seconds to import: --help and typing errors must not wait.
        from secura_serve.train.card import write
        from secura_serve.train.trainer import train

        run = train(config)
        folder = write(config, run)
    except SecuraError as error:
        print(f"secura-train: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nsecura-train: interrupted; no adapter was written", file=sys.stderr)
        return 130
    scores = ", ".join(f"{name} {value:.4g}" for name, value in run.scores.items())
    print(f"{folder}: {scores}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
