"""A digest of a base, for the names of what is kept about it."""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import version

import torch

from secura_serve.train.methods.prepared import PreparedModel

__all__ = ["base_digest"]

_VALUES = 1024


def base_digest(prepared: PreparedModel) -> str:
    """Return a digest of all that what the base writes and computes depends on.

    Of each weight it reads the first values only: two bases that differ do so in more than what
    follows them.
    """
    config, model = prepared.config, prepared.model
    prefix = getattr(getattr(model, "base_model", None), "prefix", None)
    adapted = not prepared.method.trains_all_weights
    base = model.get_base_model() if adapted else model
    digest = hashlib.sha256()
    for name, value in base.named_parameters():
        if not (adapted and prefix and prefix in name):
            plain = name.replace(".base_layer", "")
            first = value.detach().flatten()[:_VALUES].float().cpu().numpy().tobytes()
            digest.update(f"{plain} {tuple(value.shape)} {value.dtype}".encode() + first)
    facts = {
        "template": prepared.tokenizer.chat_template,
        "computes": config.dtype,
        "device": model.device.type,
        "threads": torch.get_num_threads(),
        "versions": [version(name) for name in ("torch", "transformers")],
    }
    digest.update(json.dumps(facts, sort_keys=True).encode())
    return digest.hexdigest()
