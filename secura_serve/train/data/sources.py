"""Rows of JSONL, CSV and parquet files and of data sets on the hub, before they are checked."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from secura_serve.errors import DataError
from secura_serve.system.os_errors import is_wrong_path, reason

__all__ = ["json_rows", "raw_rows"]

_DELIMITERS = {".csv": ",", ".tsv": "\t"}


def raw_rows(source: str) -> Iterator[tuple[str, Any]]:
    """Return ``(where it stands, row)`` pairs of a file or of a data set on the hub.

    A row that cannot be read is an exception in place of the row.

    Args:
        source: see :func:`secura_serve.train.data.records.read`.

    Raises:
        DataError: the source cannot be read.
    """
    file = Path(source)
    if file.suffix in _DELIMITERS:
        return _csv_rows(file, _DELIMITERS[file.suffix])
    if file.suffix == ".parquet":
        return _parquet_rows(_readable(file))
    if os.path.isfile(file) or file.suffix in (".jsonl", ".json"):
        return json_rows(file)
    return _hub_rows(source)


def json_rows(file: Path) -> Iterator[tuple[str, Any]]:
    """Return the rows of a JSONL file, see :func:`raw_rows`."""
    # Not splitlines(): a raw U+2028 may stand inside a JSON string.
    for number, line in enumerate(_text(file).split("\n"), 1):
        if not line.strip():
            continue
        raw: Any
        try:
            raw = json.loads(line, object_pairs_hook=_object)
        except json.JSONDecodeError as error:
            raw = ValueError(f"not valid JSON: {error.msg} at column {error.colno}")
        except (ValueError, RecursionError) as error:
            raw = error
        yield f"{file.name}:{number}", raw


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object; refuse equal keys, of which json would keep the last."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"field {twice!r} is given twice")
    return fields


def _csv_rows(file: Path, delimiter: str) -> Iterator[tuple[str, Any]]:
    reader = csv.DictReader(io.StringIO(_text(file), newline=""), delimiter=delimiter, strict=True)
    line = 2
    try:
        head = reader.fieldnames or []
        if len(set(head)) < len(head):
            yield f"{file.name}:1", ValueError(f"a column name is given twice: {head}")
            return
        for row in reader:
            row_or_error: Any = row
            # csv puts the values beyond the last column under None.
            if more := row.pop(None, ()):
                row_or_error = ValueError(
                    f"{len(head) + len(more)} values for {len(head)} columns; quote a value that "
                    f"holds {delimiter!r}"
                )
            yield f"{file.name}:{line}", row_or_error
            line = reader.line_num + 1
    except csv.Error as error:
        yield f"{file.name}:{line}", DataError(f"{file.name}:{line}: {error}")


def _parquet_rows(file: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow as pa
    from pyarrow import parquet

    number = 0
    try:
        for batch in parquet.ParquetFile(file).iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield f"{file.name} row {number}", row
    except (OSError, pa.ArrowException) as error:
        why = str(error).partition("\n")[0].rstrip(".")
        raise DataError(f"{file}: not a whole parquet file: {why}") from error


def _hub_rows(source: str) -> Iterator[tuple[str, Any]]:
    name, *rest = source.split(":")
    if len(rest) > 2:
        raise DataError(f"{source}: must be id[:config][:split]", wrong_use=True)
    split = rest[-1] if rest else "train"
    import datasets

    bars = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        dataset = datasets.load_dataset(name, rest[0] if len(rest) == 2 else None, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        faults = datasets.exceptions
        generating = isinstance(error, faults.DatasetGenerationError)
        no_set = generating or isinstance(error, FileNotFoundError)
        if no_set and os.path.isdir(name):
            raise DataError(
                f"{source}: is a folder, whose files do not make one data set; name one of them, a "
                "JSONL, CSV or parquet file",
                wrong_use=True,
            ) from error
        # What it says itself of a file that it cannot read names no reason.
        why = str(generating and error.__cause__ or error).partition("\n")[0]
        raise DataError(
            f"{source}: cannot be loaded as a data set: {why}. Give a JSONL, CSV or parquet file, "
            "or a hub id[:config][:split]",
            # Without the hub, only a name with an owner can be one that is there.
            wrong_use=isinstance(error, faults.DatasetNotFoundError)
            or not (os.path.exists(name) or re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name)),
        ) from error
    finally:
        if not bars:
            datasets.enable_progress_bars()
    for number, row in enumerate(dataset, 1):
        yield f"{source} row {number}", row


def _readable(file: Path) -> Path:
    try:
        # Opening a pipe would wait for whoever writes to it; a folder is told by open().
        if not file.is_dir() and not stat.S_ISREG(file.stat().st_mode):
            raise DataError(f"{file}: cannot be read: it is no regular file", wrong_use=True)
        file.open("rb").close()
    except OSError as error:
        raise _unreadable(file, error) from error
    return file


def _unreadable(file: Path, error: OSError) -> DataError:
    wrong = is_wrong_path(error)
    return DataError(f"{file}: cannot be read: {reason(error)}", wrong_use=wrong)


def _text(file: Path) -> str:
    try:
        content = file.read_bytes()
        return content.decode("utf-8-sig")
    except OSError as error:
        raise _unreadable(file, error) from error
    except UnicodeDecodeError as error:
        at = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{file.name}:{at}: not UTF-8 text: {error}") from error
