"""One adapter folder on disk: save and load.

Saving is atomic: a killed process or a full disk leaves the old adapter or none. Loading trusts
nothing: safetensors only, every key, shape, dtype and value is checked, every problem reported.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from secura_serve.adapter.format import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    AdapterConfig,
    weights_digest,
)
from secura_serve.adapter.tensors import CURModule, module_problems, parse_modules
from secura_serve.errors import AdapterFormatError, ConfigError
from secura_serve.system.atomic import atomic_folder
from secura_serve.system.os_errors import is_wrong_path, reason

__all__ = [
    "NAME_PATTERN",
    "Adapter",
    "check_name",
    "holds_its_weights",
    "is_plain_lora",
    "load",
    "load_config",
    "save",
]

NAME_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
_CONFIG_LIMIT = 16 * 2**20


@dataclass(frozen=True)
class Adapter:
    """A loaded adapter: its configuration and one :class:`CURModule` per adapted linear."""

    path: Path
    config: AdapterConfig
    modules: Mapping[str, CURModule]

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.path.name

    @property
    def r(self) -> int:
        """The rank."""
        return self.config.r

    @property
    def file_size(self) -> int:
        """Bytes of the weights file."""
        return (self.path / WEIGHTS_NAME).stat().st_size

    def without_weights(self, like: Adapter | None = None) -> Adapter:
        """Return the adapter with U's shape and dtype only (device ``meta``), without its numbers.

        For a catalog of thousands.

        Args:
            like: one without weights that is known to have an equal basis and fingerprint, which
                are then shared and not held twice.
        """
        if like is None:
            bare = {
                name: replace(cur, U=cur.U.to("meta"), rho_max=None)
                for name, cur in self.modules.items()
            }
            return replace(self, modules=bare)
        config = replace(self.config, base_fingerprint=like.config.base_fingerprint)
        return Adapter(self.path, config, like.modules)


def check_name(name: str) -> str:
    """Return ``name``; raise ConfigError unless it matches :data:`NAME_PATTERN`."""
    if not re.fullmatch(NAME_PATTERN, name):
        raise ConfigError(
            f"adapter name {name!r} is not allowed; use 1 to 64 letters, digits, '.', '_' or '-', "
            "the first a letter or digit ('@', '*' and '+' have a meaning of their own in requests)"
        )
    return name


def save(
    path: str | os.PathLike[str],
    config: AdapterConfig,
    modules: Mapping[str, CURModule],
    *,
    extra: Mapping[str, str | bytes] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write an adapter folder, all of it or nothing.

    Args:
        path: the folder; its last part is the adapter's name.
        modules: module name -> tensors; validated before the first byte is written.
        extra: further files, for instance ``train.json`` and ``README.md``.
        overwrite: replace an existing folder.

    Raises:
        AdapterFormatError: the adapter is not well-formed.
        ConfigError: a bad name, or the folder exists and ``overwrite`` is False.
    """
    from safetensors.torch import save_file

    target = Path(path).absolute()
    check_name(target.name)
    if target.exists() and not overwrite:
        raise ConfigError(f"{target} exists; choose another folder or allow overwriting it")
    AdapterConfig.from_json(json.loads(json.dumps(config.to_json())))
    problems = [p for name, cur in modules.items() for p in module_problems(name, cur, config)]
    if problems or not modules:
        raise AdapterFormatError(f"{target.name} cannot be saved:", problems or ["no modules"])
    tensors = {k: t.cpu() for name, cur in modules.items() for k, t in cur.tensors(name).items()}

    with atomic_folder(target) as new:
        save_file(tensors, new / WEIGHTS_NAME, metadata={"format": "pt"})
        digest = weights_digest((new / WEIGHTS_NAME).read_bytes())
        written = replace(config, weights_digest=digest).to_json()
        for name, content in (extra or {}).items():
            new.joinpath(name).write_bytes(
                content.encode("utf-8") if isinstance(content, str) else content
            )
        # The config makes a folder an adapter, so it is written last.
        (new / CONFIG_NAME).write_text(json.dumps(written, indent=1) + "\n")
        # safetensors makes its files private; an adapter is as readable as its config.
        shutil.copymode(new / CONFIG_NAME, new / WEIGHTS_NAME)
    return target


def is_plain_lora(path: Path) -> bool:
    """Tell whether the folder's configuration is that of a LoRA or DoRA of PEFT's.

    False where it cannot be read.
    """
    file = path / CONFIG_NAME
    try:
        # Reading a pipe or a device would wait, or never end.
        raw = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(raw, dict) and raw.get("peft_type") == "LORA"


def load(path: str | os.PathLike[str]) -> Adapter:
    """Read and check an adapter folder.

    The base is not needed; :func:`~secura_serve.adapter.verify.verify` compares with it.

    Raises:
        AdapterFormatError: with every problem found.
    """
    from safetensors import SafetensorError, safe_open

    folder = Path(path).absolute()
    fault = None
    try:
        if not folder.is_dir():
            fault = "a file, not a folder" if folder.is_file() else "no such folder"
    except OSError as error:
        fault = f"cannot be read: {reason(error)}"
    if fault is not None:
        raise AdapterFormatError(
            f"{os.fspath(path)}: {fault}; give the folder of an adapter", wrong_use=True
        )
    config = load_config(folder)
    weights = folder / WEIGHTS_NAME
    if not weights.is_file():
        pickles = sorted(p.name for ext in ("bin", "pt", "pth") for p in folder.glob(f"*.{ext}"))
        hint = f" ({', '.join(pickles)}: pickles are refused, they can run code)" if pickles else ""
        raise AdapterFormatError(f"{folder.name}: {WEIGHTS_NAME} is missing{hint}")
    try:
        # safetensors calls a file that it may not read a missing one.
        weights.open("rb").close()
    except OSError as error:
        raise AdapterFormatError(
            f"{folder.name}: {WEIGHTS_NAME} cannot be opened: {reason(error)}"
        ) from error
    try:
        with safe_open(weights, framework="pt") as file:
            # safe_open is not a mapping: it has keys() and no items().
            stored = ((key, file.get_tensor(key)) for key in file.keys())  # noqa: SIM118
            modules, problems = parse_modules(stored, config)
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterFormatError(
            f"{folder.name}: {WEIGHTS_NAME} cannot be read ({reason(error)}); it is truncated or "
            "damaged, copy or train it again"
        ) from error
    if problems:
        raise AdapterFormatError(f"{folder.name} is not a valid adapter:", problems)
    if config.weights_digest is not None and not holds_its_weights(folder, config):
        raise AdapterFormatError(
            f"{folder.name}: {WEIGHTS_NAME} is not the file that {CONFIG_NAME} was written with; "
            "a copy is not complete, or two adapters were mixed. Copy both files again"
        )
    return Adapter(folder, config, modules)


def holds_its_weights(folder: Path, config: AdapterConfig) -> bool:
    """Return whether the weights file is the one that the configuration names by digest.

    Raises:
        OSError: it cannot be read.
    """
    weights = folder / WEIGHTS_NAME
    return weights.is_file() and weights_digest(weights.read_bytes()) == config.weights_digest


def load_config(folder: Path) -> AdapterConfig:
    """Read and check ``adapter_config.json`` alone. Raises AdapterFormatError."""
    file = folder / CONFIG_NAME
    try:
        if file.exists() and not file.is_file():
            raise AdapterFormatError(f"{folder.name}: {CONFIG_NAME} is no regular file")
        if file.stat().st_size > _CONFIG_LIMIT:
            raise AdapterFormatError(f"{folder.name}: {CONFIG_NAME} is over {_CONFIG_LIMIT} bytes")
        raw = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        inside = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG_NAME}"))
        hint = f"; name one of those in it, such as {folder.name}/{inside[0]}" if inside else ""
        raise AdapterFormatError(
            f"{folder.name}: {CONFIG_NAME} is missing{hint}", wrong_use=True
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterFormatError(
            f"{folder.name}: {CONFIG_NAME} cannot be read: {reason(error)}",
            wrong_use=is_wrong_path(error),
        ) from error
    try:
        return AdapterConfig.from_json(raw)
    except AdapterFormatError as error:
        raise AdapterFormatError(f"{folder.name}: {error}", ()) from error
