"""Writing a finished run: its tensors, ``train.json``, its curves and its card (``README.md``)."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from secura_serve.adapter import save
from secura_serve.system.atomic import atomic_folder
from secura_serve.train.data.records import digest
from secura_serve.train.methods.registry import METHODS
from secura_serve.train.output import curves
from secura_serve.train.output.checkpoints import processes
from secura_serve.train.run import Run, check_out
from secura_serve.train.settings import NO_PUSHES, REPRODUCTION_ONLY, SELF, TrainConfig
from secura_serve.train.tuner import adapter_layers, exported

__all__ = ["REPRODUCTION_NOTE", "card", "is_written", "run_facts", "write"]

REPRODUCTION_NOTE = (
    "For reproduction only: its S-MagNorm mode acts on activations, so it cannot be "
    "merged or served."
)
_PACKAGES = ("torch", "transformers", "peft", "accelerate", "safetensors", "numpy")


def run_facts(config: TrainConfig, run: Run) -> dict[str, Any]:
    """Return the content of ``train.json``: how to train the same again, and what was measured."""
    facts = {
        "config": config.portable(),
        "base": run.prepared.model_id,
        "data_sha256": _digests(config),
        "trainable_parameters": run.prepared.trainable_parameters,
        "versions": {name: version(name) for name in _PACKAGES}
        | {"python": platform.python_version()},
        "device": str(next(run.model.parameters()).device.type),
        "threads": torch.get_num_threads(),
        "processes": processes(),
        "seconds": round(run.seconds, 1),
        "scores": run.scores,
    }
    if run.prepared.method.is_cur:
        layers = adapter_layers(run.model, "default")
        facts["alpha_per_module"] = {
            m: layer.secura_alpha["default"] for m, layer in layers.items()
        }
    return facts


def _digests(config: TrainConfig) -> dict[str, str | None]:
    return {name: digest(path) for name, path in config.sources().items()}


def is_written(config: TrainConfig) -> bool:
    """Return whether ``--out`` was written by a run with these settings and data."""
    try:
        facts = json.loads((Path(config.out) / "train.json").read_text(encoding="utf-8"))
        # Earlier versions knew no pushes.
        written = NO_PUSHES | type(config).upgrade(facts["config"])
        written["overwrite"] = config.overwrite
        digests = facts["data_sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return bool(written == config.portable() and digests == _digests(config))


def _data(facts: dict[str, Any]) -> str:
    settings, digests = facts["config"], facts["data_sha256"]
    if "tasks" in settings:
        return f"`{settings['tasks']}` one after another (strategy {settings['strategy']})"
    sha256 = digests["data"]
    return f"`{settings['data']}`" + (f" (SHA-256 `{sha256[:16]}…`)" if sha256 else "")


def _retention(settings: Mapping[str, Any]) -> str:
    """Say what held the model near its base, if anything did."""
    if not settings.get("retain"):
        return ""
    source = settings["retain_data"]
    text = "text that the base wrote itself" if source == SELF else f"`{source}`"
    return f", held near its base on {text} (weight {settings['retain']:g})"


def card(name: str, facts: dict[str, Any], section: str = "") -> str:
    """Return the text of ``README.md``, which ends with ``section``."""
    settings, base = facts["config"], facts["base"]
    data = _data(facts)
    scores = "\n".join(f"| {key} | {value:.4g} |" for key, value in facts["scores"].items())
    note = f"\n{REPRODUCTION_NOTE}\n" if settings["magnorm"] in REPRODUCTION_ONLY else ""
    method = METHODS[settings["method"]]
    # The hub expects an id there; a folder of this machine is none.
    header = "" if os.path.isabs(base) else f"base_model: {base}\n"
    return f"""---
{header}library_name: {method.library}
tags: [{", ".join(method.tags)}]
---
# {name}

{method.describe(settings, base)}, {facts["trainable_parameters"]:,} trainable parameters, trained
on {data}{_retention(settings)}.
The exact recipe is in `train.json`; loss and scores by step are in `curves.json`.
{note}
| measured | value |
|---|---|
{scores}
{section}"""


def write(
    config: TrainConfig,
    run: Run,
    extra: dict[str, Any] | None = None,
    files: Mapping[str, str | bytes] | None = None,
    section: str = "",
) -> Path:
    """Write ``--out``, all of it or nothing, then remove the run's checkpoints.

    ``curlora`` and ``secura`` give this project's adapter folder, ``lora`` and ``dora`` a plain
    PEFT one, ``full`` a checkpoint that loads like its base.

    Args:
        extra: added to ``train.json``.
        files: further files, name -> content.
        section: the end of the card.

    Raises:
        ConfigError: the folder exists and ``overwrite`` is off.
    """
    out = Path(os.path.abspath(config.out))
    facts = run_facts(config, run) | (extra or {})
    points = curves.points(run.history)
    written: dict[str, str | bytes] = {
        **(files or {}),
        "train.json": json.dumps(facts, indent=1) + "\n",
        "README.md": card(out.name, facts, section),
        "curves.json": json.dumps(points) + "\n",
    }
    if picture := curves.draw(points, out.name) if points["train"] else None:
        written["curves.png"] = picture
    if run.prepared.method.is_cur:
        _save_cur(out, config, run, written)
    else:
        check_out(config)
        with atomic_folder(out) as new:
            _save_plain(new, config, run)
            for name, content in written.items():
                content = content.encode("utf-8") if isinstance(content, str) else content
                new.joinpath(name).write_bytes(content)
    if run.folder is not None:
        run.folder.close()
    return out


def _save_cur(out: Path, config: TrainConfig, run: Run, files: dict[str, str | bytes]) -> None:
    save(out, *exported(run.model), extra=files, overwrite=config.overwrite)


def _save_plain(new: Path, config: TrainConfig, run: Run) -> None:
    if not run.prepared.method.trains_all_weights:
        run.model.save_pretrained(new)
        return
    dtype = getattr(torch, config.dtype)
    # A weight of two names is written under the first, as transformers does it: in another dtype it
    # would be two.
    first: dict[int, str] = {}
    state = {
        name: value.to(dtype)
        for name, value in run.model.state_dict().items()
        if first.setdefault(value.data_ptr(), name) == name
    }
    run.model.save_pretrained(new, state_dict=state)
    # The model was float32 while it was trained, and its configuration says so.
    file = new / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"dtype": config.dtype}, indent=2))
    run.prepared.tokenizer.save_pretrained(new)
