"""``secura-basis``: flags -> settings -> one call."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from secura_serve.command import CommandParser, run_command
from secura_serve.config import add_flags, build
from secura_serve.train.basis.config import BasisConfig

__all__ = ["main", "parser"]

_EXAMPLES = """examples:
  secura-basis --base smollm2-135m --out basis.safetensors
  secura-basis --base llama3-8b --out basis.safetensors --columns gradient
  secura-train --base llama3-8b --basis basis.safetensors --data mine.jsonl --out adapters/mine
"""


def parser() -> argparse.ArgumentParser:
    """Return the command line of ``secura-basis``."""
    command = CommandParser(
        "secura-basis",
        description="Rank the rows and columns of a base by what they carry on text that the base "
        "writes\nitself, for secura-train --basis. All adapters trained with one such file share "
        "it.",
        epilog=_EXAMPLES,
    )
    add_flags(command, BasisConfig)
    return command


def _run(argv: list[str]) -> int:
    config = build(BasisConfig, vars(parser().parse_args(argv)))
    config.check_out()
    # torch and transformers take seconds to import: --help and typing errors must not wait.
    from secura_serve.train.basis.make import make_basis
    from secura_serve.train.methods.base import load_base

    basis = make_basis(*load_base(config.base, config.dtype, config.device), config)
    file = basis.save(config.out)
    size = file.stat().st_size
    print(f"{file}: basis {basis.digest}, {len(basis.rankings)} linear layers, {size:,} bytes")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status, see :mod:`secura_serve.command`."""
    left = "nothing was written"
    return run_command("secura-basis", _run, argv, settings=BasisConfig, interrupted=left)


if __name__ == "__main__":
    raise SystemExit(main())
