"""The text of the retention objective: what the base writes by itself, or examples of a file."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from secura_serve.bases import cache_root
from secura_serve.system.atomic import only_writer, write_whole
from secura_serve.train.base_digest import base_digest
from secura_serve.train.data import (
    IGNORE,
    BaseText,
    Rows,
    encode,
    parse_columns,
    read,
    sample_base_text,
)
from secura_serve.train.methods.base import load_tokenizer
from secura_serve.train.methods.prepared import PreparedModel
from secura_serve.train.retention.targets import base_only
from secura_serve.train.settings import SELF, TrainConfig

__all__ = ["self_written_rows", "supplied_rows"]

_SEED = 1234
"""Not ``--seed``: runs with other seeds should share the text that took minutes to write."""


def supplied_rows(config: TrainConfig) -> Rows:
    """Return at most ``retain_sequences`` examples of the file ``retain_data``, as rows.

    Its format is that of ``data``, and ``data_columns``, ``max_length`` and ``over_long`` hold for
    it too. The same examples are drawn whatever the seed.

    Raises:
        DataError: the file is missing, or examples in it cannot be used.
    """
    records = read(config.retain_data, columns=parse_columns(config.data_columns))
    if len(records) > config.retain_sequences:
        records = random.Random(_SEED).sample(records, config.retain_sequences)
    return encode(records, load_tokenizer(config.base), config.max_length, config.over_long)


def self_written_rows(prepared: PreparedModel) -> Rows:
    """Return what the base writes by itself, as rows whose labels are all that it wrote.

    It is written once for a base, and kept in the cache folder for runs with the same settings.

    """
    text = _cached(prepared)
    head = [IGNORE] * text.start
    rows: list[list[int]] = text.tokens.tolist()
    return [{"input_ids": ids, "labels": head + ids[text.start :]} for ids in rows]


def _write(prepared: PreparedModel) -> BaseText:
    config, model = prepared.config, prepared.model
    base = model if prepared.method.trains_all_weights else model.get_base_model()
    with base_only(prepared):
        return sample_base_text(
            base,
            prepared.tokenizer,
            sequences=config.retain_sequences,
            length=config.retain_length,
            seed=_SEED,
        )


def _cached(prepared: PreparedModel) -> BaseText:
    """Return the text of the cache; write it, and the cache, where it is missing or damaged."""
    file = cache_root() / "retention" / f"{_key(prepared)}.safetensors"
    try:
        # Several processes of a run need the same text: one writes it, the others wait.
        with only_writer(file, wait=True):
            text = _read(file, prepared.config)
            if text is None:
                text = _write(prepared)
                kept = {"tokens": text.tokens, "start": torch.tensor(text.start)}
                write_whole(file, save(kept))
            return text
    # A cache that cannot be written costs the minutes again, and nothing else.
    except (OSError, SafetensorError):
        return _write(prepared)


def _read(file: Path, config: TrainConfig) -> BaseText | None:
    try:
        kept = load_file(file)
        text = BaseText(kept["tokens"], int(kept["start"]))
    except (OSError, SafetensorError, KeyError, ValueError):
        return None
    wanted = (config.retain_sequences, text.start + config.retain_length)
    return text if text.tokens.shape == wanted else None


def _key(prepared: PreparedModel) -> str:
    """Return a digest of all that the text depends on."""
    config = prepared.config
    facts = {
        "sequences": config.retain_sequences,
        "length": config.retain_length,
        "seed": _SEED,
        "source": SELF,
    }
    text = base_digest(prepared) + json.dumps(facts, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]
