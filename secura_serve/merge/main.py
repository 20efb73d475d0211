"""``secura-merge``: flags -> settings -> one call."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from secura_serve.command import CommandParser, run_command
from secura_serve.config import add_flags, build
from secura_serve.merge.config import MergeConfig

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
    add_flags(made, MergeConfig)
    return made


def _merge(config: MergeConfig) -> str:
    """Do what is asked for and return the line that says what was done."""
    # torch takes seconds to import: --help and typing errors must not wait.
    if config.to_base:
        from secura_serve.bases import resolve_base
        from secura_serve.merge.restore import restore_base

        base = resolve_base(config.to_base).path
        count = restore_base(base, Path(os.path.abspath(config.out)))
        return f"{config.out}: {count} tensors restored, bit for bit"
    assert config.base is not None  # seen to by MergeConfig
    from secura_serve.merge.methods import LINEAR, MergeMethod
    from secura_serve.merge.plan import DTYPES, out_problems, plan_merge
    from secura_serve.merge.source import open_source

    method = LINEAR
    if config.density is not None:
        method = MergeMethod(config.merge_method, config.density, config.merge_seed)
    if config.to_lora:
        from secura_serve.merge.lora import export_lora

        out = Path(os.path.abspath(config.out))
        known = out_problems(out)
        source = open_source(
            config.base, config.adapter, known, wrong_use=bool(known), method=method
        )
        facts = export_lora(source, out, rank=config.rank, dtype=DTYPES.get(config.dtype))
        said = f"{config.out}: {facts['lora']} LoRA of rank {facts['r']}"
        if facts["lora"] == "exact":
            return said
        worst = max(facts["modules"].values())
        return f"{said}; it misses at most {worst:.3g} of a layer's update (‖W′ − W − B·A‖)"
    plan = plan_merge(
        config.base,
        config.adapter,
        config.out,
        config.dtype,
        exists=config.check,
        method=method,
    )
    if config.dry_run:
        return plan.summary()
    if config.check:
        from secura_serve.merge.check import check_merge

        return f"{config.out}: {check_merge(plan)} tensors are what this merge writes"
    from secura_serve.merge.write import write_merge

    facts = write_merge(plan)
    whole = facts["overall"]
    return (
        f"{config.out}: {len(facts['modules'])} linear layers changed, by {whole['relative']:.3g} "
        f"of their norm; rounding lost {whole['lost']:.3g} of the update's norm"
    )


def _run(argv: list[str]) -> int:
    print(_merge(build(MergeConfig, vars(parser().parse_args(argv)))))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status, see :mod:`secura_serve.command`."""
    return run_command("secura-merge", _run, argv, settings=MergeConfig)


if __name__ == "__main__":
    raise SystemExit(main())
