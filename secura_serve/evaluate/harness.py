"""The papers' own tasks, through lm-evaluation-harness (PyPI ``lm_eval``, the extra ``eval``).

The harness brings prompts, few-shot examples, metrics and their standard errors; from here come
the models, local data in place of a download, and two tasks in a form that needs no network
beyond their data. No data set is part of this repository.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import util
from pathlib import Path
from typing import Any

from secura_serve.errors import ConfigError, DataError, EvaluationError
from secura_serve.evaluate.config import EvalConfig
from secura_serve.evaluate.models.base import Models
from secura_serve.evaluate.tasks import TASKS
from secura_serve.evaluate.tasks.registry import suggestion

__all__ = ["HARNESS", "Benchmark", "missing", "prepare", "run"]

_SUFFIXES = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


@dataclass(frozen=True)
class Benchmark:
    """A task of the papers."""

    title: str
    task: str | Mapping[str, Any]
    """The harness's own name, or a definition in its format."""


def _rouge(doc: Mapping[str, str], results: Sequence[str]) -> dict[str, float]:
    """Return ROUGE-1, -2 and -L (F1) of a summary, with Google's ``rouge_score``."""
    from rouge_score import rouge_scorer

    kinds = ["rouge1", "rouge2", "rougeL"]
    scores = rouge_scorer.RougeScorer(kinds, use_stemmer=True).score(doc["highlights"], results[0])
    return {kind: scores[kind].fmeasure for kind in kinds}


# The harness's own task of this name also asks for BERTScore, which downloads a second model.
_CNN: Mapping[str, Any] = {
    "task": "cnn_dailymail_rouge",
    "dataset_path": "abisee/cnn_dailymail",
    "dataset_name": "3.0.0",
    "output_type": "generate_until",
    "training_split": "train",
    "validation_split": "validation",
    "test_split": "test",
    "doc_to_text": "{{article}}\n\nSummary:",
    "doc_to_target": " {{highlights}}",
    "process_results": _rouge,
    "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 128, "do_sample": False},
    "metric_list": [
        {"metric": kind, "aggregation": "mean", "higher_is_better": True}
        for kind in ("rouge1", "rouge2", "rougeL")
    ],
    "num_fewshot": 0,
    "metadata": {"version": 1.0},
}
# Labels of the data set: 0 negative, 2 neutral (in no training row), 4 positive.
_SENTIMENT140: Mapping[str, Any] = {
    "task": "sentiment140",
    "dataset_path": "stanfordnlp/sentiment140",
    "output_type": "multiple_choice",
    "training_split": "train",
    "test_split": "test",
    "process_docs": lambda docs: docs.filter(lambda row: row["sentiment"] != 2),
    "doc_to_text": "{{text}}\nQuestion: Is this message positive or negative?\nAnswer:",
    "doc_to_target": "{{1 if sentiment == 4 else 0}}",
    "doc_to_choice": ["negative", "positive"],
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    "metadata": {"version": 1.0},
}

HARNESS: dict[str, Benchmark] = {
    "gsm8k": Benchmark("grade-school word problems, 5 shots", "gsm8k"),
    "cnn_dailymail": Benchmark("summaries, ROUGE", _CNN),
    "logiqa": Benchmark("logic, multiple choice", "logiqa"),
    "arc_easy": Benchmark("school science, multiple choice", "arc_easy"),
    "arc_challenge": Benchmark("school science, multiple choice", "arc_challenge"),
    "hellaswag": Benchmark("how a text goes on, multiple choice", "hellaswag"),
    "openbookqa": Benchmark("school science, multiple choice", "openbookqa"),
    "piqa": Benchmark("everyday physics, multiple choice", "piqa"),
    "winogrande": Benchmark("who a pronoun means, two choices", "winogrande"),
    "mrpc": Benchmark("GLUE: do two sentences say the same", "mrpc"),
    "sst2": Benchmark("GLUE: film review, positive or negative", "sst2"),
    "sentiment140": Benchmark("tweet, positive or negative", _SENTIMENT140),
    "wikitext-2": Benchmark("perplexity of Wikipedia articles", "wikitext"),
}


def missing() -> str | None:
    """Say why the harness cannot be used here, if so."""
    if util.find_spec("lm_eval") is None:
        return "pip install 'secura-serve[eval]'"
    return None


@cache
def _manager() -> Any:
    """Return the harness's index of tasks, which takes seconds to make; quiet from here on."""
    import datasets
    from lm_eval.tasks import TaskManager

    datasets.disable_progress_bars()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return TaskManager()


def prepare(name: str, config: EvalConfig) -> Any:
    """Return the harness's task object, its data read: only the model is left to fail.

    Raises:
        ConfigError: neither we nor the harness know ``name``.
        DataError: its data is not here and cannot be had, or local data does not fit.
        EvaluationError: the harness is not installed.
    """
    known = HARNESS.get(name, Benchmark(name, name))
    if reason := missing():
        raise EvaluationError(f"{name}: lm-evaluation-harness is not installed: {reason}")
    if isinstance(known.task, str) and known.task not in _manager().all_tasks:
        names = sorted([*TASKS, *HARNESS])
        raise ConfigError(
            f"task {name!r}: {suggestion(name, names)} (or another task of the harness; it has "
            "none of this name)"
        )
    spec: dict[str, Any] = {"task": known.task} if isinstance(known.task, str) else dict(known.task)
    path = config.local_data().get(name)
    if path is not None:
        spec |= _local(name, Path(path))
    if config.num_fewshot is not None:
        spec["num_fewshot"] = config.num_fewshot
    if isinstance(known.task, str):
        # Only as a member of a group does a dict change a known task; alone it is a new one.
        spec = {"group": "secura-eval", "task": [spec]}
    try:
        tasks = list(_manager().load([spec])["tasks"].values())
    except Exception as error:  # datasets, jinja, huggingface_hub and the network fail in many ways
        raise DataError(
            f"{name}: {path} cannot be read in the layout of its data set: {_line(error)}"
            if path
            else f"{name}: its data cannot be had here ({_line(error)}); "
            f"give --task-data {name}=PATH"
        ) from error
    if len(tasks) != 1:
        raise ConfigError(
            f"task {name!r} is a group of {len(tasks)}; name some of them: "
            f"{', '.join(t.task_name for t in tasks[:5])} ..."
        )
    (task,) = tasks
    _fits(name, task, path)
    return task


def _local(name: str, path: Path) -> dict[str, Any]:
    """Return the settings by which the harness reads ``path`` in place of its data set."""
    if os.path.isfile(path):
        files = dict.fromkeys(("train", "validation", "test"), path)
    else:
        files = {f.stem: f for f in sorted(path.glob("*")) if f.suffix in _SUFFIXES}
    kinds = {_SUFFIXES.get(f.suffix) for f in files.values()}
    if len(kinds) != 1 or None in kinds:
        raise DataError(
            f"{name}: --task-data {path} must be a file, or a folder of <split> files of one kind, "
            f"in {', '.join(_SUFFIXES)}",
            wrong_use=not os.path.exists(path),
        )
    return {
        "dataset_path": kinds.pop(),
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {split: str(file) for split, file in files.items()}},
    }


def _fits(name: str, task: Any, path: str | None) -> None:
    """Refuse data without a row to ask, in another layout, or without rows for the examples."""
    where = f" in {path}" if path else ""
    shots = task.config.num_fewshot
    split = task.config.fewshot_split or task.config.training_split
    try:
        if not len(task.eval_docs):
            raise DataError(f"{name}: no rows to ask{where}")
        if shots and path and (Path(path).is_file() or split not in task.dataset):
            raise DataError(
                f"{name}: {shots} examples go before each question, from {split!r} rows, which "
                f"are not{where}; give a folder with a file of them, or --num-fewshot 0"
            )
        task.doc_to_text(task.eval_docs[0])
        task.doc_to_target(task.eval_docs[0])
    except DataError:
        raise
    except Exception as error:  # a field that is not there shows in as many ways as tasks are made
        raise DataError(
            f"{name}: the rows{where} are not in the layout of its data set: {_line(error)}"
        ) from error


def run(name: str, task: Any, model: str, models: Models, config: EvalConfig) -> dict[str, Any]:
    """Measure one model on one task: ``{"n", "metrics": {name: {"value", "stderr"}}}``.

    Raises:
        EvaluationError: the model could not be asked.
    """
    from lm_eval import simple_evaluate

    try:
        results = simple_evaluate(
            model=models.harness(model),
            tasks=[task],
            # It would make the index of all its tasks anew, for every model.
            task_manager=_manager(),
            limit=config.limit or None,
            bootstrap_iters=1000,
            log_samples=False,
            verbosity="ERROR",
        )
    except (ConfigError, EvaluationError):
        raise
    except Exception as error:  # requests, aiohttp and tenacity below the harness
        raise EvaluationError(f"{model} on {name}: {_line(error)}") from error
    (scores,) = results["results"].values()
    metrics = {}
    for key, value in scores.items():
        metric, comma, how = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        spread = scores.get(f"{metric}_stderr,{how}")
        label = metric if how == "none" else f"{metric} ({how})"
        metrics[label] = {
            "value": float(value),
            "stderr": float(spread) if isinstance(spread, (int, float)) else None,
        }
    (counts,) = results["n-samples"].values()
    return {"n": counts["effective"], "metrics": metrics}


def _line(error: BaseException) -> str:
    """Return the first line of what an exception says."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
