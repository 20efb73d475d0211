"""How the commands take settings: frozen dataclasses whose field help feeds ``--help``.

Defaults stand in the dataclass and nowhere else. :func:`add_flags` turns a dataclass into argparse
flags and :func:`build` makes the dataclass from a mapping, refusing every key it does not know.
A setting that was renamed keeps its old names as ``aliases``: flags and keys of configuration
files under an old name are accepted, with a notice on stderr.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import types
import typing
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, field
from math import inf
from typing import Any, NamedTuple, TypeVar

from secura_serve.errors import ConfigError
from secura_serve.suggest import did_you_mean, near_names

__all__ = [
    "NOT_NEGATIVE",
    "POSITIVE",
    "SEED",
    "SHARE",
    "Bound",
    "add_flags",
    "at_least",
    "between",
    "build",
    "current_names",
    "not_allowed",
    "option",
]

T = TypeVar("T")


class Bound(NamedTuple):
    """What a setting must be beside its type."""

    holds: Callable[[Any], bool]
    text: str
    """What an error says that it must be, such as ``>= 1``."""

    def allows(self, value: Any) -> bool:
        """Return whether a value holds the bound; one of another type does not."""
        try:
            return self.holds(value)
        except TypeError:
            return False


def at_least(least: int) -> Bound:
    """Return the bound of a number that must not be below ``least``."""
    return Bound(lambda n: n >= least, f">= {least}")


def between(least: int, most: int) -> Bound:
    """Return the bound of a number from ``least`` to ``most``, both included."""
    return Bound(lambda n: least <= n <= most, f"{least} to {most}")


POSITIVE = Bound(lambda x: 0 < x < inf, "> 0 and finite")
"""Of rates, weights and times that cannot be 0."""
NOT_NEGATIVE = Bound(lambda x: 0 <= x < inf, ">= 0 and finite")
"""Of weights that 0 turns off."""
SHARE = Bound(lambda x: 0 <= x < 1, "in [0, 1)")
"""Of a part of a whole that cannot be all of it."""
SEED = Bound(lambda n: 0 <= n < 2**32, "in [0, 2**32)")
"""Of what seeds random numbers."""


def option(
    help: str,
    default: Any = MISSING,
    choices: Collection[str] | None = None,
    aliases: tuple[str, ...] = (),
    *,
    metavar: str | None = None,
    split: bool = True,
    bound: Bound | None = None,
) -> Any:
    """Return a dataclass field with its ``--help`` line.

    Args:
        help: what ``--help`` says; the default is added to it.
        default: the value where none is given; without it the setting must be given.
        choices: the allowed values, where only some are; see :func:`not_allowed`.
        aliases: old names, as flags (``"old-name"``) or keys (``"old_name"``); still accepted.
        metavar: what ``--help`` calls the value.
        split: whether a list may be given as one text with commas.
        bound: what a value must be beside its type; see :func:`not_allowed`.
    """
    names = tuple(alias.lstrip("-").replace("-", "_") for alias in aliases)
    facts = {"help": help, "choices": choices, "aliases": names, "metavar": metavar}
    return field(default=default, metadata=facts | {"split": split, "bound": bound})


def _flag(name: str) -> str:
    """Return the flag of a setting: ``--old-name`` for ``old_name``."""
    return "--" + name.replace("_", "-")


def _notify(old: str, new: str) -> None:
    print(f"{old} is now called {new}; the old name still works", file=sys.stderr)


def _plain_type(hint: Any) -> tuple[type, bool]:
    """Return the type of an annotation such as ``int | None``, and whether None is allowed."""
    if isinstance(hint, types.UnionType):
        inner = [t for t in typing.get_args(hint) if t is not type(None)]
        return inner[0], len(inner) < len(typing.get_args(hint))
    return typing.get_origin(hint) or hint, False


def _split_at_commas(text: str) -> list[str]:
    """Return ``a,b`` as a list."""
    return [part.strip() for part in text.split(",") if part.strip()]


def _with_notice(action: type[argparse.Action], flag: str) -> type[argparse.Action]:
    """Return ``action`` for an old flag: it says that the flag is now called ``flag``."""

    class Renamed(action):  # type: ignore[valid-type, misc]
        def __call__(
            self,
            parser: argparse.ArgumentParser,
            namespace: argparse.Namespace,
            values: Any,
            option_string: str | None = None,
        ) -> None:
            negated = (option_string or "").startswith("--no-")
            _notify(str(option_string), flag.replace("--", "--no-", 1) if negated else flag)
            super().__call__(parser, namespace, values, option_string)

    return Renamed


def add_flags(
    parser: argparse._ActionsContainer,
    cls: type,
    skip: Collection[str] = (),
    nargs: Mapping[str, str] | None = None,
) -> None:
    """Add one ``--flag`` per field of ``cls`` but those in ``skip``, and its old names unlisted.

    A flag that is not given leaves no attribute. A field of type ``tuple[str, ...]`` takes names
    joined by commas, and its flag may be repeated; one in ``nargs`` takes them as argparse does.
    """
    hints = typing.get_type_hints(cls)
    for item in dataclasses.fields(cls):
        if item.name in skip:
            continue
        type_, _ = _plain_type(hints[item.name])
        text = item.metadata["help"]
        required = item.default is MISSING
        if not required and item.default is not None and item.default != ():
            text += f" (default: {item.default})"
        action: type[argparse.Action] = argparse._StoreAction
        extra: dict[str, Any] = {"type": type_}
        if choices := item.metadata["choices"]:
            # Only shown: build() refuses another value, together with all other problems.
            extra["metavar"] = f"{{{','.join(choices)}}}"
        if type_ is bool:
            action, extra = argparse.BooleanOptionalAction, {}
        elif type_ is tuple:
            action, extra = argparse._ExtendAction, {"type": _split_at_commas}
            if not item.metadata["split"]:
                action, extra = argparse._AppendAction, {}
        if nargs and item.name in nargs:
            action, extra = argparse._StoreAction, {"nargs": nargs[item.name]}
        if item.metadata["metavar"] is not None:
            extra["metavar"] = item.metadata["metavar"]
        extra |= {"dest": item.name, "default": argparse.SUPPRESS}
        flag = _flag(item.name)
        parser.add_argument(flag, action=action, help=text.replace("%", "%%"), **extra)
        for old in item.metadata["aliases"]:
            renamed = _with_notice(action, flag)
            parser.add_argument(_flag(old), action=renamed, help=argparse.SUPPRESS, **extra)


def _unknown(keys: list[str], fields: Mapping[str, Any]) -> list[str]:
    close = {k: near_names(k.replace("-", "_"), fields, most=1) for k in keys}
    told = [f"{k}: unknown" + (f"; did you mean {c[0]!r}?" if c else "") for k, c in close.items()]
    # Once, however many there are: the list is long.
    return told + ([] if all(close.values()) else [f"allowed: {', '.join(sorted(fields))}"])


def _as_written(value: Any, type_: type) -> Any:
    """Return ``value`` as the command line would have given it."""
    if type_ is str and isinstance(value, list):
        return ",".join(map(str, value))
    if type_ is str and isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    if type_ is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def current_names(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``values`` with each key that is an old name of a setting of ``cls`` replaced.

    Call it on each source of settings before one is put on top of another.

    Raises:
        ConfigError: a setting is given under its old and its new name.
    """
    renamed = {old: item.name for item in dataclasses.fields(cls) for old in _aliases(item)}
    problems = [
        f"{old} is the old name of {renamed[old]}, which is given too; leave one out"
        for old in values
        if old in renamed and renamed[old] in values
    ]
    if problems:
        raise ConfigError("the settings are not valid:", problems)
    for old in values:
        if old in renamed:
            _notify(old, renamed[old])
    return {renamed.get(key, key): value for key, value in values.items()}


def _aliases(item: dataclasses.Field[Any]) -> tuple[str, ...]:
    names: tuple[str, ...] = item.metadata.get("aliases", ())
    return names


def _problem(item: dataclasses.Field[Any], value: Any) -> list[str]:
    """Return what is wrong with a value; None is left to its type."""
    allowed, bound = item.metadata.get("choices"), item.metadata.get("bound")
    if value is None:
        return []
    if allowed and value not in allowed:
        # From Python it may be anything.
        hint = did_you_mean(value, allowed) if isinstance(value, str) else ""
        return [f"{item.name}: got {value!r}, allowed: {', '.join(allowed)}{hint}"]
    if bound is not None and not bound.allows(value):
        return [f"{item.name}: got {value!r}, must be {bound.text}"]
    return []


def not_allowed(settings: Any) -> list[str]:
    """Return a problem for each field of a settings object outside its choices or its bound.

    For ``__post_init__``: whoever makes the object in Python has not come through :func:`build`.
    """
    return [
        problem
        for item in dataclasses.fields(settings)
        for problem in _problem(item, getattr(settings, item.name))
    ]


def build(cls: type[T], values: Mapping[str, Any]) -> T:
    """Return ``cls(**values)``, or raise with every unknown key, missing key and wrong type.

    What YAML reads differently from a command line is put right: a list or a number given for a
    text, and ``1e-3``, which YAML 1.1 takes for a text.

    Raises:
        ConfigError: with one problem per key.
    """
    hints = typing.get_type_hints(cls)
    values = current_names(cls, values)
    fields = {item.name: item for item in dataclasses.fields(cls)}  # type: ignore[arg-type]
    problems = _unknown([str(key) for key in values if key not in fields], fields)
    good: dict[str, Any] = {}
    outside: list[str] = []
    for name, item in fields.items():
        if name not in values:
            if item.default is MISSING:
                problems.append(f"{name}: missing; it must be given")
            continue
        value, (type_, optional) = values[name], _plain_type(hints[name])
        value = _as_written(value, type_)
        if type_ is tuple and isinstance(value, list):
            value = tuple(value)
        right = (value is None and optional) or (
            isinstance(value, type_) and (type_ is bool or not isinstance(value, bool))
        )
        if not right:
            problems.append(f"{name}: got {value!r}, expected {type_.__name__}")
        else:
            outside += _problem(item, value)
        good[name] = value
    if not problems:
        try:
            made = cls(**good)
        except ConfigError as error:
            if not outside:
                raise
            # What it says of itself, told together with what contradicts another setting.
            problems = [problem for problem in error.problems if problem not in outside]
        else:
            if not outside:
                return made
    raise ConfigError("the settings are not valid:", problems + outside)
