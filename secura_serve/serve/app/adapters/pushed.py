"""An adapter made of a trainer's new U and of the basis that the server knows already."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from secura_serve import adapter as adapters
from secura_serve.adapter import Adapter
from secura_serve.adapter.tensors import FLOATS
from secura_serve.errors import LifecycleError
from secura_serve.serve.app.adapters.library import Version
from secura_serve.serve.basis import base_id

__all__ = ["with_new_cores"]

_PREFIX = "base_model.model."


def with_new_cores(
    version: Version, body: bytes, basis: str | None = None, magnorm: str | None = None
) -> tuple[bytes, bytes]:
    """Return the two files of an adapter that is ``version`` but for its U.

    Args:
        body: a safetensors file with ``base_model.model.<module>.secura_U`` of every module, and
            ``secura_rho_max`` where the S-MagNorm mode has one.
        basis: the ``base_id`` that the U belong to; None is not compared.
        magnorm: the S-MagNorm that they were trained with, as sorted JSON; None is not compared.

    Raises:
        LifecycleError: (400) the body cannot be read; (409) it is for another basis.
    """
    known = version.entry.adapter
    assert known is not None
    if basis is not None and basis != base_id(known):
        raise LifecycleError(
            409, f"the weights belong to the basis {basis[:64]}, {version} to {base_id(known)}"
        )
    own = json.dumps(known.config.magnorm.to_json(), sort_keys=True)
    if magnorm is not None and magnorm != own:
        raise LifecycleError(
            409, f"the weights were trained with S-MagNorm {magnorm[:200]}, {version} has {own}"
        )
    try:
        given = load(body)
    except (SafetensorError, ValueError, KeyError, RuntimeError, OverflowError) as error:
        raise LifecycleError(400, f"the body is no safetensors file: {error}") from error
    broken = [key for key, tensor in given.items() if not _finite(tensor)]
    if broken:
        raise LifecycleError(400, f"{broken[0]!r:.200} holds NaN or Inf")
    tensors = _completed(known, given)
    modules, problems = adapters.parse_modules(tensors.items(), known.config)
    if problems or not modules:
        shown = "; ".join(problems[:6])
        raise LifecycleError(409, f"the weights do not fit the basis of {version}: {shown}")
    weights = save(tensors, metadata={"format": "pt"})
    config: dict[str, Any] = known.config.to_json()
    config["weights_digest"] = adapters.weights_digest(weights)
    return (json.dumps(config) + "\n").encode(), weights


def _completed(known: Adapter, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Add rows and columns to U."""
    tensors = {key: tensor.contiguous() for key, tensor in given.items()}
    for name, cur in known.modules.items():
        if f"{_PREFIX}{name}.secura_U" in tensors:
            for field, index in (("rows", cur.rows), ("cols", cur.cols)):
                tensors.setdefault(f"{_PREFIX}{name}.secura_{field}", index)
    return tensors


def _finite(tensor: Tensor) -> bool:
    # A number that is too large for float32 counts as infinite.
    return tensor.dtype not in FLOATS or bool(torch.isfinite(tensor.float()).all())
