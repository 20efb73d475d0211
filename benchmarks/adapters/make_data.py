"""Write the training and held-out data of the shipped adapters.

    python -m benchmarks.adapters.make_data --out data [--task extract]

Writes ``<task>.train.jsonl`` and ``<task>.test.jsonl`` from the rows of ``secura_serve.evaluate``.
The shipped adapters were trained before there was a validation split: its rows are at the end of
the training file, as they were then.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from secura_serve.evaluate import load_task
from secura_serve.evaluate.tasks.rows import jsonl

TASKS = ("sentiment", "extract", "iso-date")


def write(task: str, folder: Path) -> tuple[Path, Path]:
    """Make one task's two files; always the same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    entry = load_task(task)
    train, test = folder / f"{task}.train.jsonl", folder / f"{task}.test.jsonl"
    train.write_text(jsonl(entry.rows("train") + entry.rows("validation")), encoding="utf-8")
    test.write_text(jsonl(entry.rows("test")), encoding="utf-8")
    return train, test


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--task", choices=TASKS, help="one task; all by default")
    given = parser.parse_args()
    for task in [given.task] if given.task else TASKS:
        print(*write(task, given.out))


if __name__ == "__main__":
    main()
