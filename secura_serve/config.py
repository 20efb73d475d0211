"""How the commands take settings: frozen dataclasses whose field help feeds ``--help``.

Defaults stand in the dataclass and nowhere else. :func:`add_flags` turns a dataclass into argparse
flags and :func:`build` makes the dataclass from a mapping, refusing every key it does not know.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Collection, Mapping
from dataclasses import MISSING, field
from typing import Any, NoReturn, TypeVar

from secura_serve.errors import ConfigError

__all__ = ["add_flags", "brief_errors", "build", "option"]

T = TypeVar("T")


def option(help: str, default: Any = MISSING, choices: tuple[str, ...] | None = None) -> Any:
    """A dataclass field with its ``--help`` line and, where closed, its allowed values."""
    return field(default=default, metadata={"help": help, "choices": choices})


def _kind(hint: Any) -> tuple[type, bool]:
    """The plain type of an annotation such as ``int | None``, and whether None is allowed."""
    if isinstance(hint, types.UnionType):
        inner = [t for t in typing.get_args(hint) if t is not type(None)]
        return inner[0], len(inner) < len(typing.get_args(hint))
    return typing.get_origin(hint) or hint, False


def _listed(text: str) -> list[str]:
    """``a,b`` as a list."""
    return [part.strip() for part in text.split(",") if part.strip()]


def add_flags(parser: argparse._ActionsContainer, cls: type, skip: Collection[str] = ()) -> None:
    """Add one ``--flag`` per field of ``cls`` but those in ``skip``.

    A flag that is not given leaves no attribute. A field of type ``tuple[str, ...]`` takes names
    joined by commas, and its flag may be repeated.
    """
    hints = typing.get_type_hints(cls)
    for item in dataclasses.fields(cls):
        if item.name in skip:
            continue
        kind, _ = _kind(hints[item.name])
        text = item.metadata["help"]
        required = item.default is MISSING
        if not required and item.default is not None and item.default != ():
            text += f" (default: {item.default})"
        extra: dict[str, Any] = {"choices": item.metadata["choices"], "type": kind}
        if kind is bool:
            extra = {"action": argparse.BooleanOptionalAction}
        elif kind is tuple:
            extra = {"action": "extend", "type": _listed}
        parser.add_argument(
            "--" + item.name.replace("_", "-"),
            help=text.replace("%", "%%"),
            default=argparse.SUPPRESS,
            **extra,
        )


def brief_errors(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Have ``parser`` raise ConfigError where argparse prints pages of usage and exits."""

    def error(message: str) -> NoReturn:
        flags = re.findall(r"--[\w-]+", parser.format_help())
        unknown = re.findall(r"--[\w-]+", message) if "unrecognized" in message else []
        close = [m for word in unknown for m in difflib.get_close_matches(word, flags, n=1)]
        hint = f"; did you mean {', '.join(close)}?" if close else ""
        raise ConfigError(f"{message}{hint} (--help lists the flags)")

    parser.error = error  # type: ignore[method-assign]
    return parser


def _unknown(keys: list[str], fields: Mapping[str, Any]) -> list[str]:
    close = {k: difflib.get_close_matches(k.replace("-", "_"), fields, n=1) for k in keys}
    told = [f"{k}: unknown" + (f"; did you mean {c[0]!r}?" if c else "") for k, c in close.items()]
    # Once, however many there are: the list is long.
    return told + ([] if all(close.values()) else [f"allowed: {', '.join(sorted(fields))}"])


def _as_written(value: Any, kind: type) -> Any:
    """``value`` as the command line would have given it."""
    if kind is str and isinstance(value, list):
        return ",".join(map(str, value))
    if kind is str and isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    if kind is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def build(cls: type[T], values: Mapping[str, Any]) -> T:
    """``cls(**values)`` with every unknown key, missing key and wrong type told at once.

    What YAML reads differently from a command line is put right: a list or a number given for a
    text, and ``1e-3``, which YAML 1.1 takes for a text.

    Raises:
        ConfigError: with one problem per key.
    """
    hints = typing.get_type_hints(cls)
    fields = {item.name: item for item in dataclasses.fields(cls)}  # type: ignore[arg-type]
    problems = _unknown([str(key) for key in values if key not in fields], fields)
    good: dict[str, Any] = {}
    for name, item in fields.items():
        if name not in values:
            if item.default is MISSING:
                problems.append(f"{name}: missing; give --{name.replace('_', '-')}")
            continue
        value, (kind, optional) = values[name], _kind(hints[name])
        value = _as_written(value, kind)
        if kind is tuple and isinstance(value, list):
            value = tuple(value)
        right = (value is None and optional) or (
            isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
        )
        allowed = item.metadata["choices"]
        if not right:
            problems.append(f"{name}: got {value!r}, expected {kind.__name__}")
        elif allowed and value is not None and value not in allowed:
            problems.append(f"{name}: got {value!r}, allowed: {', '.join(allowed)}")
        good[name] = value
    if problems:
        raise ConfigError("the settings are not valid:", problems)
    return cls(**good)
