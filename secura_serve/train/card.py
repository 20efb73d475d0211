"""Writing a finished run: the adapter's tensors, ``train.json`` and its card ``README.md``."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from secura_serve.adapter import fingerprint, save
from secura_serve.config import TrainConfig
from secura_serve.train.data import digest
from secura_serve.train.model import adapter_layers
from secura_serve.train.trainer import Run

__all__ = ["card", "recipe", "write"]

_PACKAGES = ("torch", "transformers", "peft", "safetensors", "numpy")


def recipe(config: TrainConfig, run: Run) -> dict[str, Any]:
    """Everything that is needed to train the adapter again, and what was measured."""
    settings = asdict(config)
    # The folder names of this machine say nothing about the adapter; the digests do.
    for key in ("out", "data", "eval_data"):
        settings[key] = settings[key] and Path(settings[key]).name
    files = {"data": config.data} | ({"eval_data": config.eval_data} if config.eval_data else {})
    layers = adapter_layers(run.model, "default")
    return {
        "config": settings,
        "base": run.model_id,
        "data_sha256": {name: digest(path) for name, path in files.items()},
        "trainable_parameters": sum(p.numel() for p in run.model.parameters() if p.requires_grad),
        "alpha_per_module": {m: layer.secura_alpha["default"] for m, layer in layers.items()},
        "versions": {name: version(name) for name in _PACKAGES}
        | {"python": platform.python_version()},
        "device": str(next(run.model.parameters()).device.type),
        "threads": torch.get_num_threads(),
        "seconds": round(run.seconds, 1),
        "scores": run.scores,
    }


def card(name: str, facts: dict[str, Any]) -> str:
    """The text of ``README.md`` for a run without further evaluation."""
    settings = facts["config"]
    scores = "\n".join(f"| {key} | {value:.4g} |" for key, value in facts["scores"].items())
    base, data = facts["base"], settings["data"]
    return f"""---
base_model: {base}
library_name: secura-serve
tags: [secura, cur, peft]
---
# {name}

A CUR adapter (ΔW = C·U·R, only U trained) for `{base}`: rank {settings["rank"]}, core
`{settings["core"]}`, S-MagNorm `{settings["magnorm"]}`, {facts["trainable_parameters"]:,} trained
numbers, trained on `{data}` (SHA-256 `{facts["data_sha256"]["data"][:16]}…`). The exact recipe is
in `train.json`.

| measured | value |
|---|---|
{scores}
"""


def write(config: TrainConfig, run: Run, extra: dict[str, Any] | None = None) -> Path:
    """Save the adapter folder, all of it or nothing; ``extra`` goes into ``train.json``.

    Raises:
        ConfigError: the folder exists and ``overwrite`` is off.
    """
    out = Path(os.path.abspath(config.out))
    layers = adapter_layers(run.model, "default")
    settings = run.model.peft_config["default"]
    settings.base_fingerprint = {
        module: fingerprint(layer.pristine, layer.basis("default"))
        for module, layer in layers.items()
    }
    facts = recipe(config, run) | (extra or {})
    return save(
        out,
        settings.to_adapter_config(),
        {module: layer.export("default") for module, layer in layers.items()},
        extra={
            "train.json": json.dumps(facts, indent=1) + "\n",
            "README.md": card(out.name, facts),
        },
        overwrite=config.overwrite,
    )
