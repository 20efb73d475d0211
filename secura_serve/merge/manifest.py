"""The record of a merge: ``secura_manifest.json`` for programs, ``README.md`` for people.

The manifest names every tensor that was touched, with the digest that it had in the base, so that
the base can be told from any other and put back bit for bit.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from secura_serve import __version__
from secura_serve.adapter.format import CONFIG_NAME, WEIGHTS_NAME
from secura_serve.errors import MergeError
from secura_serve.merge.fold import Change
from secura_serve.merge.io.buffers import DIGEST
from secura_serve.merge.plan import MergePlan
from secura_serve.merge.source import Source
from secura_serve.system.os_errors import is_wrong_path, reason

__all__ = ["MANIFEST", "card", "describe", "manifest", "read_manifest"]

MANIFEST = "secura_manifest.json"
_FORMAT = 2


def describe(source: Source) -> dict[str, Any]:
    """Return the base, the adapters with their digests, the norm, and the versions used."""
    return {
        "base": source.model_id,
        "adapters": [
            {
                "name": adapter.name,
                "weight": weight,
                "sha256": {
                    name: hashlib.sha256((adapter.path / name).read_bytes()).hexdigest()
                    for name in (CONFIG_NAME, WEIGHTS_NAME)
                },
            }
            for adapter, weight in source.adapters
        ],
        "magnorm": source.norm.to_json(),
        **({"method": method} if (method := source.method.to_json()) else {}),
        "versions": {
            "secura-serve": __version__,
            "torch": version("torch"),
            "safetensors": version("safetensors"),
            "python": platform.python_version(),
        },
    }


def manifest(
    plan: MergePlan, digests: Mapping[str, str], changes: Mapping[str, Change]
) -> dict[str, Any]:
    """Return the JSON object of ``secura_manifest.json``.

    Args:
        digests: by tensor, of the base.
        changes: by module.
    """
    touched = dict(sorted(digests.items()))
    whole = hashlib.sha256(json.dumps(touched).encode()).hexdigest()
    dtype = plan.fold.dtype
    return {
        "format_version": _FORMAT,
        **describe(plan.source),
        "dtype": "kept" if dtype is None else str(dtype).removeprefix("torch."),
        "base_sha256": whole,
        "touched": touched,
        "overall": asdict(Change.combined(changes.values())),
        "modules": {name: asdict(change) for name, change in changes.items()},
    }


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest of a merged checkpoint; ``touched`` has ``algorithm:hex`` by tensor.

    Raises:
        MergeError: there is none, or none that this version reads.
    """
    try:
        values = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if "format_version" not in values:
            raise ValueError("it describes no merged checkpoint")
        if values["format_version"] != _FORMAT:
            raise ValueError(f"format_version {values['format_version']!r}, not {_FORMAT}")
        if unknown := {d.partition(":")[0] for d in values["touched"].values()} - {DIGEST}:
            raise ValueError(f"digests by {', '.join(sorted(unknown))}, not {DIGEST}")
        str(values["dtype"]), str(values["base"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise MergeError(
            f"{folder} has no {MANIFEST} that can be used ({reason(error)}): give a merged "
            "checkpoint that secura-merge wrote",
            wrong_use=is_wrong_path(error),
        ) from error
    return dict(values)


def card(name: str, facts: Mapping[str, Any]) -> str:
    """Return the text of ``README.md``."""
    norm = facts["magnorm"] or {"mode": "none"}
    mixed = "\n".join(
        f"| `{a['name']}` | {a['weight']:g} | `{a['sha256'][WEIGHTS_NAME][:16]}` |"
        for a in facts["adapters"]
    )
    changes = facts["modules"].values()
    keys = ("relative", "largest", "lost")
    top, whole = {key: max(c[key] for c in changes) for key in keys}, facts["overall"]
    return f"""---
base_model: {facts["base"]}
base_model_relation: merge
library_name: transformers
tags: [secura, cur, merge]
---
# {name}

`{facts["base"]}` with CUR adapters folded into its weights by secura-merge
{facts["versions"]["secura-serve"]}: a plain checkpoint, loaded like its base.

| adapter | weight | SHA-256 |
|---|---|---|
{mixed}

Method: {facts.get("method", "linear")}.
S-MagNorm: {", ".join(f"{key} {value}" for key, value in norm.items())}. Arithmetic in float32,
rounded once; dtype {facts["dtype"]}. {len(facts["modules"])} linear layers changed, the others are
the base's, byte for byte unless the dtype changed.

| changed layers | all taken as one | at most in one layer |
|---|---|---|
| ‖W′ − W‖ / ‖W‖ | {whole["relative"]:.3g} | {top["relative"]:.3g} |
| max abs(W′ − W) / abs(W), large near W = 0 | {whole["largest"]:.3g} | {top["largest"]:.3g} |
| share of the update's norm lost to rounding | {whole["lost"]:.3g} | {top["lost"]:.3g} |

`{MANIFEST}` has these per layer, and the digests of the base's tensors, with which
`secura-merge --to-base` restores them.
"""
