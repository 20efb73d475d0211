"""The experiment of plan.yaml as a queue: what is finished is kept and not run again.

    python -m benchmarks.front.run [--jobs 1] [--only lora] [--until-minutes 90] [--pause-file F]

Every run is a process of its own with one CPU thread, and adds one line to
``benchmarks/results/front/runs.jsonl``; where there is a GPU it is used. report.py draws tables and
plots from that file. To have a run done again, take its line out.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks._queue import add_queue_flags, run_process, work_off
from benchmarks.experiment.runs import read_runs
from benchmarks.front.runs import FILE, waiting


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_queue_flags(parser, jobs=1, work=Path("runs/front"))
    parser.add_argument("--only", nargs="+", metavar="VARIANT", help="these variants alone")
    given = parser.parse_args()

    def ready() -> list[str]:
        return [job.name for job in waiting() if not given.only or job.variant in given.only]

    if given.dry_run:
        print("\n".join(ready()))
        return
    work_off(
        ready=ready,
        start=lambda name: run_process("benchmarks.front.one", name, given.work),
        finished=lambda name: name in read_runs(FILE),
        given=given,
    )


if __name__ == "__main__":
    main()
