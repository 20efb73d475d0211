"""The registry of continual-learning strategies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING

from secura_serve.registry import Registry

if TYPE_CHECKING:
    from secura_serve.train.continual.strategies.base import Strategy

__all__ = ["STRATEGIES", "StrategyEntry", "get_strategy", "register_strategy"]


@dataclass(frozen=True)
class StrategyEntry:
    """A registered strategy; see :func:`register_strategy`."""

    strategy: type[Strategy] | str
    summary: str
    settings: tuple[str, ...]
    conflicts: Mapping[str, str]


STRATEGIES = Registry[StrategyEntry]("strategy")
"""The registered strategies by name; an unknown name raises."""


def register_strategy(
    name: str,
    strategy: type[Strategy] | str,
    *,
    summary: str,
    settings: tuple[str, ...] = (),
    conflicts: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Make a strategy known as ``--strategy NAME``.

    Args:
        strategy: a subclass of ``Strategy``, or ``"module:Class"``, which is imported when it is
            first used.
        summary: what it does about forgetting, for ``--help``.
        settings: the fields of ``SequenceConfig`` that only some strategies read and this one does.
        conflicts: settings that cannot be used with it -> the reason.

    Raises:
        ConfigError: the name is taken.
    """
    STRATEGIES.add(name, StrategyEntry(strategy, summary, settings, conflicts))


def get_strategy(name: str) -> type[Strategy]:
    """Return the class of the strategy called ``name``.

    Raises:
        ConfigError: there is none; the message lists the names that are allowed.
    """
    strategy = STRATEGIES[name].strategy
    if isinstance(strategy, str):
        module, _, attribute = strategy.partition(":")
        imported: type[Strategy] = getattr(import_module(module), attribute)
        return imported
    return strategy
