"""Training examples from a file or the hub, each checked and named by its file and line.

One example is ``{"messages": [{"role", "content"}, ...]}`` that ends with the assistant, or
``{"prompt": ..., "completion": ...}``; a line of JSONL, a row of CSV or parquet, or an item of a
data set that the ``datasets`` library finds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secura_serve.errors import DataError
from secura_serve.train.data.sources import json_rows, raw_rows

__all__ = ["Record", "digest", "parse_columns", "read", "read_jsonl"]

_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Record:
    """One example: the messages before the answer, the answer, and its file and line."""

    messages: tuple[dict[str, str], ...]
    answer: str
    where: str


def digest(path: str | Path) -> str | None:
    """Return the SHA-256 of a file, hexadecimal; None for what is no file, such as a hub id."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest() if Path(path).is_file() else None


def parse_columns(text: str | None) -> dict[str, str]:
    """Return ``prompt=question,completion=answer`` as a dict."""
    return dict(pair.split("=", 1) for pair in text.split(",")) if text else {}


def read(
    source: str, *, columns: Mapping[str, str] | None = None, labels: Iterable[str] = ()
) -> list[Record]:
    """Read and check data from a file (``.parquet``, ``.csv``, ``.tsv``, else JSONL) or the hub.

    Args:
        source: a file, or what ``datasets.load_dataset`` takes, as ``id[:config][:split]``; the
            split is ``train`` where none is named.
        columns: our name of a field -> its name in the data.
        labels: the only completions allowed; none given allows all.

    Raises:
        DataError: listing file, line (or row) and field of every fault (the first 20 of them).
    """
    return _records(source, raw_rows(source), columns or {}, set(labels))


def read_jsonl(path: str | Path) -> list[Record]:
    """Read and check a JSONL file, see :func:`read`."""
    return _records(str(path), json_rows(Path(path)), {}, set())


def _records(
    source: str,
    rows: Iterable[tuple[str, Any]],
    columns: Mapping[str, str],
    labels: set[str],
) -> list[Record]:
    records, problems = [], []
    for where, raw in rows:
        try:
            if isinstance(raw, Exception):
                raise raw
            record = _record(raw, where, columns)
            if labels and record.answer not in labels:
                raise DataError(
                    f"{where}: {_quoted('completion', columns)} {record.answer!r:.60} is not one "
                    f"of the labels {', '.join(sorted(labels))}"
                )
            records.append(record)
        except (ValueError, RecursionError) as error:
            problems.append(str(error) if isinstance(error, DataError) else f"{where}: {error}")
    if problems:
        raise DataError(f"{source} cannot be used:", problems)
    if not records:
        raise DataError(f"{source}: no examples; write one JSON object per line, or one row each")
    return records


def _quoted(field: str, columns: Mapping[str, str]) -> str:
    return f"field {columns.get(field, field)!r}"


def _record(raw: Any, where: str, columns: Mapping[str, str]) -> Record:
    if not isinstance(raw, dict):
        raise DataError(f"{where}: must be a JSON object, got {type(raw).__name__}")
    pair = [columns.get(field, field) for field in ("prompt", "completion")]
    if (chat := columns.get("messages", "messages")) not in raw:
        if absent := [name for name in pair if name not in raw]:
            raise DataError(
                f"{where}: no field {' and no field '.join(map(repr, absent))}; there are "
                f"{', '.join(map(repr, raw)) or 'none'} (--data-columns prompt=NAME,"
                "completion=NAME says what they are called)"
            )
        texts = {}
        for field in ("prompt", "completion"):
            value = raw.get(columns.get(field, field))
            texts[field] = _checked_text(value, _quoted(field, columns), where)
        return Record(({"role": "user", "content": texts["prompt"]},), texts["completion"], where)
    messages, name = raw[chat], _quoted("messages", columns)
    if any(raw.get(field) is not None for field in pair):
        raise DataError(f"{where}: holds {name} and {' or '.join(map(repr, pair))}; leave one out")
    if not isinstance(messages, list) or len(messages) < 2:
        raise DataError(f"{where}: {name} must be a list of at least two messages")
    for i, message in enumerate(messages):
        inner = f"{name[:-1]}[{i}]"
        if not isinstance(message, dict) or message.get("role") not in _ROLES:
            raise DataError(f"{where}: {inner}.role' must be one of {', '.join(_ROLES)}")
        _checked_text(message.get("content"), f"{inner}.content'", where)
    if messages[-1]["role"] != "assistant":
        raise DataError(f"{where}: {name} must end with the assistant's answer")
    if not any(message["role"] == "user" for message in messages):
        raise DataError(f"{where}: {name} must hold a user's message before the answer")
    turns = tuple({"role": m["role"], "content": m["content"]} for m in messages)
    return Record(turns[:-1], turns[-1]["content"], where)


def _checked_text(value: Any, named: str, where: str) -> str:
    """Return ``value``, if it is text that a tokenizer can read."""
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}: {named} must be a non-empty string, got {value!r:.60}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = value[error.start]
        raise DataError(
            f"{where}: {named} holds {half!r}, half of a surrogate pair and no character"
        ) from error
    return value
