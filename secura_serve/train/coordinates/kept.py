"""Files of moments: what a basis sees of its base's own text, measured once."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from secura_serve.adapter import fingerprint_of
from secura_serve.method import Basis, gather
from secura_serve.train.coordinates.moments import Moments
from secura_serve.train.tuner import SecuraLayer

__all__ = ["encode_moments", "read_moments"]


def encode_moments(
    moments: Mapping[str, Moments], layers: Mapping[str, SecuraLayer], name: str
) -> bytes:
    """Return a safetensors file of the moments, float32, with the rows and columns they are of.

    A basis is a prefix of any larger one of its seed, so the file serves smaller ranks as well.

    Args:
        layers: the layers by module; ``name`` is the adapter whose basis it is.
    """
    tensors: dict[str, Tensor] = {}
    prints: dict[str, str] = {}
    for module, measured in moments.items():
        basis = layers[module].basis(name)
        tensors[f"{module}.inputs"] = measured.inputs.to(torch.float32)
        tensors[f"{module}.gradients"] = measured.gradients.to(torch.float32)
        tensors[f"{module}.rows"] = basis.rows.to("cpu", torch.int32)
        tensors[f"{module}.cols"] = basis.cols.to("cpu", torch.int32)
        prints[module] = _fingerprint(layers[module].pristine, basis)
    return save(tensors, {"fingerprints": json.dumps(prints)})


def read_moments(
    file: Path, layers: Mapping[str, SecuraLayer], name: str
) -> dict[str, Moments] | None:
    """Return the moments in ``file``; None if it is missing or damaged, or for other layers."""
    moments = {}
    try:
        with safe_open(file, "pt") as opened:
            prints = json.loads((opened.metadata() or {})["fingerprints"])
            for module, layer in layers.items():
                basis = layer.basis(name)
                r = basis.r
                same = all(
                    torch.equal(opened.get_tensor(f"{module}.{key}")[:r].long(), part.cpu())
                    for key, part in zip(("rows", "cols"), basis, strict=True)
                )
                if not same or prints[module] != _fingerprint(layer.pristine, basis):
                    return None
                read = (opened.get_tensor(f"{module}.{key}") for key in ("inputs", "gradients"))
                parts = [part[:r, :r].double() for part in read]
                if not all(part.shape == (r, r) and part.isfinite().all() for part in parts):
                    return None
                moments[module] = Moments(*parts)
    except (OSError, SafetensorError, LookupError, TypeError, ValueError, RecursionError):
        return None
    return moments


def _fingerprint(W: Tensor, basis: Basis) -> str:
    """Return what tells bases apart: the first row and column, so that it is the same for every
    rank, rounded, so that it is the same for a base in bfloat16 and in float32."""
    first = basis.prefix(1)
    C, R = (part.to(torch.bfloat16) for part in gather(W, first))
    return fingerprint_of(C, R, first)
