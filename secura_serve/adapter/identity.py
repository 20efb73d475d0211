"""``base_id``: what two adapters have in common when their U alone can be exchanged."""

from __future__ import annotations

import hashlib

import torch

from secura_serve.adapter.store import Adapter

__all__ = ["base_id"]


def base_id(adapter: Adapter) -> str:
    """Return a digest of the adapter's base fingerprints and of its row and column indices.

    Adapters of one base, rank, target set and seed have the same digest, so the checkpoint is
    compared once for all of them, and a trainer may send a new U without the rest.
    """
    digest = hashlib.sha256()
    for name, cur in sorted(adapter.modules.items()):
        claim = adapter.config.base_fingerprint[name]
        digest.update(f"{name}|{claim}|{len(cur.rows)}\n".encode())
        digest.update(torch.cat([cur.rows, cur.cols]).to(torch.int32).numpy().tobytes())
    return digest.hexdigest()[:32]
