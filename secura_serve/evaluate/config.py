"""Settings of ``secura-eval``."""

from __future__ import annotations

from dataclasses import dataclass

from secura_serve.addresses import url_problem
from secura_serve.config import POSITIVE, Bound, at_least, not_allowed, option
from secura_serve.errors import ConfigError

__all__ = ["EvalConfig"]


@dataclass(frozen=True)
class EvalConfig:
    """One run of ``secura-eval``; stored in full in ``results.json``."""

    tasks: tuple[str, ...] = option(
        "tasks by name, joined by commas (see --list)", bound=Bound(bool, "at least one name")
    )
    out: str = option("folder to write: results.json, answers.jsonl, report.md, report.png")
    endpoint: str | None = option(
        "an OpenAI-compatible server, e.g. http://127.0.0.1:8000/v1", None
    )
    model: tuple[str, ...] = option(
        "with --endpoint: models to ask, joined by commas; the base is asked besides "
        "(default: all that the server lists as ready)",
        (),
    )
    base: str | None = option(
        "without a server: base model, an alias, a hub id or a local folder", None
    )
    adapter: tuple[str, ...] = option("with --base: adapter folders, joined by commas", ())
    split: str = option("rows to ask of the offline tasks", "test", ("test", "validation"))
    limit: int = option(
        "first items of each task to ask; 0 asks all", 200, aliases=("items",), bound=at_least(0)
    )
    task_data: tuple[str, ...] = option(
        "TASK=PATH: local data of a harness task in the layout of its data set: a file, or a "
        "folder of <split>.jsonl (.json, .parquet, .csv)",
        (),
    )
    num_fewshot: int | None = option(
        "examples before each question of a harness task (default: the task's own number)",
        None,
        aliases=("shots",),
        bound=at_least(0),
    )
    retention: bool = option("measure what each model keeps of the base", True)
    kl_texts: int = option(
        "with --endpoint: neutral texts, of up to 64 tokens, to measure KL on; two requests and "
        "megabytes for each token, from a server with --max-logprobs -1",
        0,
        bound=at_least(0),
    )
    api: str = option(
        "with --endpoint: how the offline tasks are asked; completions is for a base without a "
        "chat template",
        "chat",
        ("chat", "completions"),
    )
    tokenizer: str | None = option(
        "with --endpoint: tokenizer for the harness, a name or folder (default: the base's, from "
        "the folder that the server names)",
        None,
    )
    concurrency: int = option("requests on their way at a time", 16, bound=at_least(1))
    timeout: float = option("seconds to wait for one answer", 120.0, bound=POSITIVE)
    retries: int = option("times a request that failed is sent again", 2, bound=at_least(0))
    dtype: str = option(
        "with --base: dtype of the model", "bfloat16", ("bfloat16", "float16", "float32")
    )
    device: str = option("with --base: where to run", "auto", ("auto", "cpu"))
    overwrite: bool = option("replace an existing --out", False)

    def __post_init__(self) -> None:
        problems = not_allowed(self)
        if self.endpoint is not None and (problem := url_problem(self.endpoint)):
            problems.append(f"endpoint: {problem}")
        if (self.endpoint is None) == (self.base is None):
            problems.append("give either --endpoint URL or --base NAME")
        if self.endpoint is None and (self.model or self.tokenizer):
            problems.append("--model and --tokenizer go with --endpoint; name --adapter folders")
        if self.endpoint is None and self.kl_texts:
            problems.append("--kl-texts goes with --endpoint; here KL is measured on all texts")
        if self.base is None and self.adapter:
            problems.append("--adapter goes with --base; name --model at an endpoint")
        problems += [
            f"task_data: got {spec!r}, write TASK=PATH"
            for spec in self.task_data
            if not all(spec.partition("="))
        ]
        if problems:
            raise ConfigError("the settings are not valid:", problems)

    def local_data(self) -> dict[str, str]:
        """Return task -> path, from ``task_data``."""
        return {spec.partition("=")[0]: spec.partition("=")[2] for spec in self.task_data}
