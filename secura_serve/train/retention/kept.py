"""The base's targets of a text, computed once and kept for later runs."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save

from secura_serve.bases import cache_root
from secura_serve.system.atomic import only_writer, write_whole
from secura_serve.train.base_digest import base_digest
from secura_serve.train.data import IGNORE, Rows
from secura_serve.train.methods.prepared import PreparedModel
from secura_serve.train.retention.targets import TOP, Targets, base_targets

__all__ = ["kept_targets"]


def kept_targets(prepared: PreparedModel, rows: Rows) -> Targets:
    """Return :func:`base_targets` of ``rows``, from the cache where they are there."""
    file = cache_root() / "targets" / f"{_key(prepared, rows)}.safetensors"
    labels = sum(label != IGNORE for row in rows for label in row["labels"])
    try:
        # Several processes of a run need the same ones: one computes, the others wait.
        with only_writer(file, wait=True):
            if (found := _read(file, labels)) is None:
                found = base_targets(prepared, rows)
                parts = {"ids": found.ids, "log_p": found.log_p, "log_rest": found.log_rest}
                write_whole(file, save({name: part.contiguous() for name, part in parts.items()}))
            return found
    # A cache that cannot be written costs the forward passes again, and nothing else.
    except (OSError, SafetensorError):
        return base_targets(prepared, rows)


def _read(file: Path, labels: int) -> Targets | None:
    try:
        kept = load_file(file)
        targets = Targets(kept["ids"], kept["log_p"], kept["log_rest"])
    except (OSError, SafetensorError, KeyError):
        return None
    return targets if len(targets.ids) == labels else None


def _key(prepared: PreparedModel, rows: Rows) -> str:
    facts = {
        "rows": [[row["input_ids"], row["labels"]] for row in rows],
        "top": TOP,
        # It computes under autocast on float32 weights, not on weights of that dtype.
        "full": prepared.method.trains_all_weights,
    }
    text = base_digest(prepared) + json.dumps(facts)
    return hashlib.sha256(text.encode()).hexdigest()[:32]
