"""The adapter folder's file names, and ``adapter_config.json`` after PEFT's conventions."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from secura_serve.errors import AdapterFormatError, ConfigError
from secura_serve.method import MagNorm, selection_problem

__all__ = [
    "CONFIG_NAME",
    "FORMAT_VERSION",
    "PEFT_TYPE",
    "WEIGHTS_NAME",
    "AdapterConfig",
    "weights_digest",
]

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PEFT_TYPE = "SECURA"
FORMAT_VERSION = 1

# Keys that PEFT's own PeftConfig writes too; none of them changes what the adapter computes.
_PEFT_KEYS = {
    "auto_mapping",
    "exclude_modules",
    "inference_mode",
    "init",
    "layers_pattern",
    "layers_to_transform",
    "peft_version",
    "revision",
    "task_type",
}


@dataclass(frozen=True)
class AdapterConfig:
    """The keys of ``adapter_config.json``."""

    base_model_name_or_path: str
    r: int
    target_modules: tuple[str, ...]
    base_fingerprint: Mapping[str, str]
    """Module name -> digest of W's shape and of the rows and columns used."""
    alpha: float | str = "auto"
    """How it was trained; already multiplied into U."""
    selection: Mapping[str, Any] = field(
        default_factory=lambda: {"rule": "inverse_sampled", "seed": 0}
    )
    core: str = "u"
    """``u``: U trained directly (CURLoRA). ``ab``: U = A·B was trained (SECURA's CABR)."""
    inner_rank: int | None = None
    magnorm: MagNorm = field(default_factory=MagNorm)
    weights_digest: str | None = None
    """:func:`weights_digest` of the weights file, so that a mixture of two adapters is noticed;
    None in folders that another program wrote."""
    format_version: int = FORMAT_VERSION

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object, PEFT's keys first."""
        digest = {} if self.weights_digest is None else {"weights_digest": self.weights_digest}
        return {
            "peft_type": PEFT_TYPE,
            "task_type": "CAUSAL_LM",
            "inference_mode": True,
            "format_version": self.format_version,
            "base_model_name_or_path": self.base_model_name_or_path,
            "r": self.r,
            "alpha": self.alpha,
            "target_modules": list(self.target_modules),
            "selection": dict(self.selection),
            "core": self.core,
            "inner_rank": self.inner_rank,
            "magnorm": self.magnorm.to_json(),
            **digest,
            "base_fingerprint": dict(self.base_fingerprint),
        }

    @classmethod
    def from_json(cls, raw: Any) -> AdapterConfig:
        """Parse and check. Raises AdapterFormatError listing every problem."""
        if not isinstance(raw, Mapping):
            raise AdapterFormatError(f"{CONFIG_NAME} must hold a JSON object")
        if raw.get("peft_type") != PEFT_TYPE:
            raise AdapterFormatError(
                f"peft_type is {raw.get('peft_type')!r}; this program reads {PEFT_TYPE!r} adapters"
            )
        version = raw.get("format_version")
        if version != FORMAT_VERSION:
            raise AdapterFormatError(
                f"format_version is {version!r}; this program reads {FORMAT_VERSION}. "
                "Upgrade secura-serve, or write the adapter again with this version"
            )
        problems = _config_problems(raw)
        norm = MagNorm()
        try:
            norm = MagNorm.from_json(raw.get("magnorm"))
        except ConfigError as error:
            problems.append(str(error))
        if problems:
            raise AdapterFormatError(f"{CONFIG_NAME} is not valid:", problems)
        return cls(
            base_model_name_or_path=raw["base_model_name_or_path"],
            r=raw["r"],
            target_modules=tuple(raw["target_modules"]),
            base_fingerprint=dict(raw["base_fingerprint"]),
            alpha=raw["alpha"],
            selection=dict(raw["selection"]),
            core=raw["core"],
            inner_rank=raw.get("inner_rank"),
            magnorm=norm,
            weights_digest=raw.get("weights_digest"),
        )


def weights_digest(weights: bytes | memoryview) -> str:
    """Return 32 hex digits of BLAKE3 over a weights file's bytes."""
    from blake3 import blake3

    digest: str = blake3(weights).hexdigest()[:32]
    return digest


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _config_problems(raw: Mapping[str, Any]) -> list[str]:
    """Return every key that is missing, of the wrong type, out of range or unknown."""

    def strings(value: Any) -> bool:
        return isinstance(value, list) and bool(value) and all(isinstance(v, str) for v in value)

    def alpha(value: Any) -> bool:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        # Not isfinite: a Python integer may be too large for it.
        return value == "auto" or (number and abs(value) <= sys.float_info.max)

    def fingerprints(value: Any) -> bool:
        return (
            isinstance(value, Mapping)
            and bool(value)
            and all(isinstance(v, str) for v in value.values())
        )

    inner, needs = raw.get("inner_rank"), selection_problem(raw.get("selection"))
    allowed: dict[str, tuple[Callable[[Any], bool], str]] = {
        "base_model_name_or_path": (lambda v: isinstance(v, str), "a string"),
        "r": (lambda v: _is_int(v) and 1 <= v <= 65536, "an integer >= 1"),
        "alpha": (alpha, 'a number or "auto"'),
        "target_modules": (strings, "a non-empty list of strings"),
        "selection": (lambda v: needs is None, str(needs)),
        "core": (lambda v: v in ("u", "ab"), '"u" or "ab"'),
        "base_fingerprint": (fingerprints, "an object of module name -> digest"),
    }
    digest = raw.get("weights_digest")
    problems = [] if digest is None or isinstance(digest, str) else ["weights_digest: a string"]
    problems += [
        f"{key}: got {raw.get(key)!r:.80}, allowed: {what}"
        for key, (accepts, what) in allowed.items()
        if not accepts(raw.get(key))
    ]
    if raw.get("core") == "ab" and not (isinstance(inner, int) and inner >= 1):
        problems.append(f'inner_rank: got {inner!r}, core "ab" needs an integer >= 1')
    known = {
        *allowed,
        "weights_digest",
        "inner_rank",
        "magnorm",
        "peft_type",
        "format_version",
        *_PEFT_KEYS,
    }
    problems += [
        f"{key!r}: unknown key; it could change what the adapter means, so it is refused"
        for key in sorted(set(raw) - known)
    ]
    return problems
