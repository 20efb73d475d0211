"""One adapter folder on disk: save, load, verify.

Saving is atomic: everything is written to a hidden folder beside the target and renamed at the
end, so that a killed process or a full disk leaves either the old adapter or none. Loading
trusts nothing: safetensors only, every key, shape, dtype and value checked, all problems told.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from secura_serve.adapter.fingerprint import mismatch
from secura_serve.adapter.format import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    AdapterConfig,
    CURModule,
    module_problems,
)
from secura_serve.adapter.place import replacing
from secura_serve.errors import (
    AdapterFormatError,
    BaseMismatchError,
    BaseModelError,
    ConfigError,
)

__all__ = [
    "NAME_PATTERN",
    "Adapter",
    "WeightSource",
    "check_name",
    "is_plain_lora",
    "load",
    "mismatches",
    "refuse_mismatches",
    "save",
    "verify",
]

NAME_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
_CONFIG_LIMIT = 16 * 2**20
_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.secura_(?P<field>\w+)")
_FIELDS = {"U", "rows", "cols", "rho_max"}


class WeightSource(Protocol):
    """Whatever can give a base's pristine weights by module name, ``(out, in)``."""

    def shape(self, module: str) -> tuple[int, int]: ...

    def weight(self, module: str) -> Tensor: ...


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

    def outline(self, like: Adapter | None = None) -> Adapter:
        """What a catalog of thousands keeps: U has only shape and dtype (device ``meta``), and
        basis and fingerprint are those of ``like``, an outline that is known to have equal ones."""
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
            "the first a letter or digit"
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
    target = Path(path).absolute()
    check_name(target.name)
    if target.exists() and not overwrite:
        raise ConfigError(f"{target} exists; choose another folder or allow overwriting it")
    AdapterConfig.from_json(json.loads(json.dumps(config.to_json())))
    problems = [p for name, cur in modules.items() for p in module_problems(name, cur, config)]
    if problems or not modules:
        raise AdapterFormatError(f"{target.name} cannot be saved:", problems or ["no modules"])
    tensors = {k: t.cpu() for name, cur in modules.items() for k, t in cur.tensors(name).items()}

    with replacing(target) as new:
        save_file(tensors, new / WEIGHTS_NAME, metadata={"format": "pt"})
        for name, content in (extra or {}).items():
            new.joinpath(name).write_bytes(
                content.encode("utf-8") if isinstance(content, str) else content
            )
        # The config makes a folder an adapter, so it is written last.
        (new / CONFIG_NAME).write_text(json.dumps(config.to_json(), indent=1) + "\n")
        # safetensors makes its files private; an adapter is as readable as its config.
        shutil.copymode(new / CONFIG_NAME, new / WEIGHTS_NAME)
    return target


def is_plain_lora(path: Path) -> bool:
    """Whether the folder says that it holds a LoRA of PEFT's, or a DoRA; False where it cannot be
    read."""
    try:
        raw = json.loads((path / CONFIG_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(raw, dict) and raw.get("peft_type") == "LORA"


def load(path: str | os.PathLike[str]) -> Adapter:
    """Read and check an adapter folder; the base is not needed (see :func:`verify`).

    Raises:
        AdapterFormatError: with every problem found.
    """
    folder = Path(path).absolute()
    if not folder.is_dir():
        raise AdapterFormatError(f"{os.fspath(path)}: no such folder; give that of an adapter")
    config = _load_config(folder)
    weights = folder / WEIGHTS_NAME
    if not weights.is_file():
        pickles = sorted(p.name for ext in ("bin", "pt", "pth") for p in folder.glob(f"*.{ext}"))
        hint = f" ({', '.join(pickles)}: pickles are refused, they can run code)" if pickles else ""
        raise AdapterFormatError(f"{folder.name}: {WEIGHTS_NAME} is missing{hint}")
    fields: dict[str, dict[str, Tensor]] = {}
    problems = []
    try:
        with safe_open(weights, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - safe_open is not a mapping
                match = _KEY.fullmatch(key)
                if match is None or match["field"] not in _FIELDS:
                    problems.append(f"tensor {key!r} is not part of the format")
                else:
                    fields.setdefault(match["module"], {})[match["field"]] = file.get_tensor(key)
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterFormatError(
            f"{folder.name}: {WEIGHTS_NAME} cannot be read ({error}); it is truncated or damaged, "
            "copy or train it again"
        ) from error
    modules = {}
    for module, named in fields.items():
        missing = sorted({"U", "rows", "cols"} - set(named))
        if missing:
            problems.append(f"{module}: secura_{', secura_'.join(missing)} missing")
            continue
        peak = named.get("rho_max")
        if peak is not None and peak.numel() != 1:
            problems.append(f"{module}: secura_rho_max must be a scalar")
            continue
        modules[module] = CURModule(
            named["U"], named["rows"], named["cols"], None if peak is None else float(peak)
        )
        problems += module_problems(module, modules[module], config)
    absent = sorted(set(config.base_fingerprint) - set(fields))
    problems += [f"{module}: in base_fingerprint but without tensors" for module in absent]
    if problems:
        raise AdapterFormatError(f"{folder.name} is not a valid adapter:", problems)
    return Adapter(folder, config, modules)


def _load_config(folder: Path) -> AdapterConfig:
    file = folder / CONFIG_NAME
    try:
        if file.stat().st_size > _CONFIG_LIMIT:
            raise AdapterFormatError(f"{folder.name}: {CONFIG_NAME} is over {_CONFIG_LIMIT} bytes")
        raw = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise AdapterFormatError(f"{folder.name}: {CONFIG_NAME} is missing") from error
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterFormatError(f"{folder.name}: {CONFIG_NAME} cannot be read: {error}") from error
    try:
        return AdapterConfig.from_json(raw)
    except AdapterFormatError as error:
        raise AdapterFormatError(f"{folder.name}: {error}", ()) from error


def verify(adapter: Adapter, base: WeightSource, *, module: str | None = None) -> None:
    """Check that ``adapter`` was trained on ``base``, by fingerprint; ``module`` checks only one.

    Raises:
        BaseMismatchError: naming the first differing module, and how many differ.
    """
    refuse_mismatches(adapter, mismatches(adapter, base, module=module))


def mismatches(adapter: Adapter, base: WeightSource, *, module: str | None = None) -> list[str]:
    """Every module of ``adapter``, or just ``module``, that ``base`` does not have like this."""
    names = list(adapter.modules) if module is None else [module]
    problems = []
    for name in names:
        cur = adapter.modules[name]
        try:
            base.shape(name)
        except (KeyError, BaseModelError):
            problems.append(f"{name}: the base has no such linear layer")
            continue
        claimed = adapter.config.base_fingerprint[name]
        if reason := mismatch(base.weight(name), cur.basis, claimed):
            problems.append(f"{name}: {reason}")
    return problems


def refuse_mismatches(adapter: Adapter, problems: Sequence[str]) -> None:
    """Raise BaseMismatchError if :func:`mismatches` found any."""
    if problems:
        more = f" (and {len(problems) - 1} more modules)" if len(problems) > 1 else ""
        raise BaseMismatchError(
            f"{adapter.name} was trained on another base "
            f"({adapter.config.base_model_name_or_path}): {problems[0]}{more}. "
            "Serve it with that base, or train it again on this one"
        )
