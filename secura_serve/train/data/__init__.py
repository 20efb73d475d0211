"""Training data: records read from files or the hub, encoded into rows, put into batches."""

from __future__ import annotations

from secura_serve.train.data.base_text import BaseText, sample_base_text
from secura_serve.train.data.batches import IGNORE, Batch, Collate, Collator, Rows, mix
from secura_serve.train.data.encoding import encode, prompt_ids, split
from secura_serve.train.data.records import Record, digest, parse_columns, read, read_jsonl

__all__ = [
    "IGNORE",
    "BaseText",
    "Batch",
    "Collate",
    "Collator",
    "Record",
    "Rows",
    "digest",
    "encode",
    "mix",
    "parse_columns",
    "prompt_ids",
    "read",
    "read_jsonl",
    "sample_base_text",
    "split",
]
