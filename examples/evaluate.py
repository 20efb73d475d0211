"""Score a base and an adapter on a task of your own, with intervals and a paired comparison.

Needs no server: `pip install 'secura-serve[train,eval,embedded]'`, and the adapters of this
repository; about a minute on two cores.

    python examples/evaluate.py

`secura-eval --list` shows the tasks that are built in.
"""

from __future__ import annotations

import argparse

from secura_serve.evaluate import EvalConfig, Task, evaluate, register_task

DATES = {
    "May 3, 1994": "1994-05-03",
    "the 14th of July 2031": "2031-07-14",
    "9 Nov. 1989": "1989-11-09",
    "Sunday, July 20, 1969": "1969-07-20",
    "2 February 2002": "2002-02-02",
    "Dec 31 1999": "1999-12-31",
    "the 1st of April 1976": "1976-04-01",
    "October 26th, 1985": "1985-10-26",
}


def rows() -> dict[str, list[tuple[str, str]]]:
    """Return the rows of each split as (prompt, wanted answer)."""
    prompt = "Write this date in the format YYYY-MM-DD: "
    return {"test": [(prompt + words, date) for words, date in DATES.items()]}


register_task(
    Task(
        name="my-dates",
        title="date in words -> YYYY-MM-DD",
        source="this file",
        scoring="word",  # the wanted word stands in the answer
        max_new_tokens=48,
        load=rows,
    )
)

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--base", default="smollm2-135m")
parser.add_argument("--adapter", default="adapters/iso-date")
args = parser.parse_args()

config = EvalConfig(
    tasks=("my-dates",),
    out="-",  # nothing is written; secura_serve.evaluate.write_report would write a folder here
    base=args.base,
    adapter=(args.adapter,),
    retention=False,
)
results = evaluate(config)
for model, score in results.tasks["my-dates"]["scores"].items():
    interval = f"[{score['low']:.2f}, {score['high']:.2f}]"
    print(f"{model}: {score['right']} of {score['n']} right, 95 % interval {interval}")
for model, pair in results.tasks["my-dates"]["against_base"].items():
    print(f"{model} against the base: {pair['difference']:+.2f}, p = {pair['p']:.2g}")
