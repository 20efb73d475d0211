"""``secura-eval``: flags -> settings -> one call."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from secura_serve.command import CommandParser, run_command
from secura_serve.config import add_flags, build
from secura_serve.errors import ConfigError
from secura_serve.evaluate.config import EvalConfig

__all__ = ["main", "parser"]

_DESCRIPTION = """\
Score a base and its adapters on tasks, and measure what each adapter keeps of the base. All get
the same prompts and the same lenient scoring; the report has intervals and paired comparisons."""

_EXAMPLES = """\
Tasks are of two kinds. Offline ones are made here or read from an installed package. The papers'
own go through lm-evaluation-harness, the extra `eval`; their data comes from the hub, or from
--task-data. `--list` shows both, and what is missing here. Any other task of the harness works by
its name, too.

examples:
  secura-eval --list
  secura-eval --endpoint http://127.0.0.1:8000/v1 --model sentiment,iso-date \\
      --tasks sentiment,iso-date --out report
  secura-eval --base smollm2-135m --adapter adapters/iso-date-bounded --tasks iso-date --out report
  secura-eval --endpoint http://127.0.0.1:8000 --model iso-date --tasks gsm8k,sst2 \\
      --task-data gsm8k=data/gsm8k --task-data sst2=data/sst2 --no-retention --out report
  secura-eval --write-data data --tasks arithmetic,capitals    # then: secura-train --data \\
      data/arithmetic.train.jsonl --eval-data data/arithmetic.validation.jsonl ...

An adapter for which the server has no place (--resident 0, say) answers at an endpoint only while
it is folded (POST /admin/fold). The base does not answer then, so there is nothing to compare with.
--base and --adapter have no such limit.
$OPENAI_API_KEY is sent where the endpoint wants a key."""


def parser() -> argparse.ArgumentParser:
    """Return the command line of ``secura-eval``."""
    made = CommandParser("secura-eval", description=_DESCRIPTION, epilog=_EXAMPLES)
    made.add_argument("--list", action="store_true", help="list the tasks and exit")
    made.add_argument(
        "--write-data",
        metavar="DIR",
        help="write train, validation and test rows of the offline tasks (all, or --tasks) as "
        "JSONL and exit",
    )
    add_flags(made, EvalConfig)
    return made


def _listing() -> str:
    from secura_serve.evaluate import harness
    from secura_serve.evaluate.tasks import TASKS

    rows = [("offline task", "rows from", "scored by", "here", "what")]
    for task in TASKS.values():
        what = task.title + (f" (stands in for {task.stands_for})" if task.stands_for else "")
        rows.append((task.name, task.source, task.scoring, task.missing() or "yes", what))
    rows.append(("", "", "", "", ""))
    rows.append(("papers' task", "rows from", "scored by", "here", "what"))
    absent = harness.missing()
    for name, entry in harness.HARNESS.items():
        here = absent or "hub, or --task-data"
        rows.append((name, "its data set", "harness", here, entry.title))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = ["  ".join(c.ljust(w) for c, w in zip(r, [*widths, 0], strict=True)) for r in rows]
    return "\n".join(line.rstrip() for line in lines)


def _settings(given: dict[str, Any]) -> EvalConfig:
    config = build(EvalConfig, given)
    from secura_serve.evaluate import chart
    from secura_serve.evaluate.report import check_out

    check_out(config)
    if reason := chart.missing():
        raise ConfigError(f"the chart needs matplotlib: {reason}")
    return config


def _run(argv: list[str]) -> int:
    given = vars(parser().parse_args(argv))
    listing, folder = given.pop("list"), given.pop("write_data")
    if listing:
        print(_listing())
        return 0
    if folder:
        from secura_serve.evaluate.tasks import TASKS, write_data

        names = given.get("tasks") or [name for name, task in TASKS.items() if not task.missing()]
        for file in write_data(names, Path(folder), overwrite=given.get("overwrite", False)):
            print(file)
        return 0
    config = _settings(given)
    from secura_serve.evaluate.report import write_report
    from secura_serve.evaluate.run import evaluate

    out = write_report(evaluate(config), config, argv)
    print(f"{(out / 'report.md').read_text(encoding='utf-8')}\n{out}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status, see :mod:`secura_serve.command`."""
    left = "no report was written"
    return run_command("secura-eval", _run, argv, settings=EvalConfig, interrupted=left)


if __name__ == "__main__":
    raise SystemExit(main())
