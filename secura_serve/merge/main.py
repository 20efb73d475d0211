"""``secura-merge``: flags -> plan -> one call."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from secura_serve.command import CommandParser, run_command
from secura_serve.errors import ConfigError

__all__ = ["main", "parser"]

_EXAMPLES = """examples:
  secura-merge --base smollm2-135m --adapter adapters/sentiment --out merged
  secura-merge --base llama3-8b --adapter a*0.5 --adapter b --out mixed --dry-run
  secura-merge --base llama3-8b --adapter a --out merged --check
  secura-merge --to-base path/to/base --out merged
  secura-merge --to-lora --base llama3-8b --adapter a --out a-lora
  secura-merge --to-lora --base llama3-8b --adapter bounded --approximate --rank 64 --out b-lora
"""


def parser() -> argparse.ArgumentParser:
    """Return the command line of ``secura-merge``."""
    made = CommandParser(
        "secura-merge",
        description="Fold CUR adapters into a checkpoint that loads like its base.",
        epilog=_EXAMPLES,
    )
    add = made.add_argument
    add("--base", help="base model: an alias, a hub id or a local folder")
    add(
        "--adapter",
        action="append",
        default=[],
        metavar="DIR[*WEIGHT]",
        help="adapter folder, may be repeated: one weighted sum, S-MagNorm on the total",
    )
    add("--out", required=True, help="folder to write; it appears whole or not at all")
    add(
        "--dtype",
        choices=("auto", "bfloat16", "float16", "float32"),
        default="auto",
        help="dtype of the output; auto keeps the base's (--to-lora: float32) (default: auto)",
    )
    task = made.add_mutually_exclusive_group()
    add = task.add_argument
    add("--dry-run", action="store_true", help="check everything, print the plan, write nothing")
    add("--check", action="store_true", help="compare --out with what would be written")
    add(
        "--to-base",
        metavar="BASE",
        help="verify that BASE is the base of the merge in --out, and put its tensors back there; "
        "--out is then the base again, without the merge's card and manifest",
    )
    add(
        "--to-lora",
        action="store_true",
        help="write a plain LoRA folder instead: exact for S-MagNorm none",
    )
    made.add_argument(
        "--approximate",
        action="store_true",
        help="with --to-lora: the best LoRA of --rank, its error measured",
    )
    made.add_argument("--rank", type=int, help="rank of --approximate")
    return made


def _conflicts(args: argparse.Namespace) -> list[str]:
    """Return what is wrong with the flags: some are missing, or do not go together."""
    problems = []
    if args.to_base:
        if args.base or args.adapter or args.dtype != "auto":
            problems.append("--to-base takes --out only: the merge's manifest knows the rest")
    elif not args.base:
        problems.append("--base is missing: an alias, a hub id or a folder")
    if args.approximate != (args.rank is not None):
        problems.append("--approximate and --rank k belong together")
    if args.approximate and not args.to_lora:
        problems.append("--approximate needs --to-lora")
    if args.rank is not None and args.rank < 1:
        problems.append(f"--rank: got {args.rank}, must be >= 1")
    return problems


def _merge(args: argparse.Namespace) -> str:
    """Do what the flags ask for; returns the line that says what was done."""
    if problems := _conflicts(args):
        raise ConfigError("the flags are not valid:", problems)
    # torch takes seconds to import: --help and typing errors must not wait.
    if args.to_base:
        from secura_serve.bases import resolve_base
        from secura_serve.merge.restore import restore_base

        base = resolve_base(args.to_base).path
        count = restore_base(base, Path(os.path.abspath(args.out)))
        return f"{args.out}: {count} tensors restored, bit for bit"
    from secura_serve.merge.plan import DTYPES, plan_merge, space_problems
    from secura_serve.merge.source import open_source

    if args.to_lora:
        from secura_serve.merge.lora import export_lora

        out = Path(os.path.abspath(args.out))
        source = open_source(args.base, args.adapter, space_problems(out, 0))
        facts = export_lora(source, out, rank=args.rank, dtype=DTYPES.get(args.dtype))
        said = f"{args.out}: {facts['lora']} LoRA of rank {facts['r']}"
        if facts["lora"] == "exact":
            return said
        worst = max(facts["modules"].values())
        return f"{said}; it misses at most {worst:.3g} of a layer's update (‖W′ − W − B·A‖)"
    plan = plan_merge(args.base, args.adapter, args.out, args.dtype, exists=args.check)
    if args.dry_run:
        return plan.summary()
    if args.check:
        from secura_serve.merge.check import check_merge

        return f"{args.out}: {check_merge(plan)} tensors are what this merge writes"
    from secura_serve.merge.write import write_merge

    facts = write_merge(plan)
    whole = facts["overall"]
    return (
        f"{args.out}: {len(facts['modules'])} linear layers changed, by {whole['relative']:.3g} of "
        f"their norm; rounding lost {whole['lost']:.3g} of the update's norm"
    )


def _run(argv: list[str]) -> int:
    print(_merge(parser().parse_args(argv)))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status, see :mod:`secura_serve.command`."""
    return run_command("secura-merge", _run, argv)


if __name__ == "__main__":
    raise SystemExit(main())
