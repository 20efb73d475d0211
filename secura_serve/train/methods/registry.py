"""``Method``: what one value of ``--method`` stands for, and the registry of all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from secura_serve.registry import Registry

if TYPE_CHECKING:
    from peft import PeftConfig

    from secura_serve.train.settings import TrainConfig

__all__ = ["ADAPTER_SETTINGS", "METHODS", "TARGET_SETTINGS", "Method", "register_method"]

TARGET_SETTINGS = frozenset({"targets", "exclude", "layers", "layers_pattern"})
"""Settings that say which layers are trained."""
ADAPTER_SETTINGS = TARGET_SETTINGS | {"rank", "dropout"}
"""Settings that every method with an adapter supports."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """A training method.

    Args:
        summary: what is trained, for ``--help``.
        describe: ``(settings, base) -> str``, the start of the first sentence of the card.
        peft_config: ``(settings, what all adapters need) -> PeftConfig``; None trains the weights
            of the base themselves. Import PEFT inside it.
        settings: the settings that it supports, of those that some methods do not.
        defaults: values of the settings that are None unless they are given.
        is_cur: whether it gives this project's adapter folder, and not a plain PEFT one.
        library: ``library_name`` of the card.
        tags: ``tags`` of the card.
    """

    summary: str
    describe: Callable[[Mapping[str, Any], str], str]
    peft_config: Callable[[TrainConfig, dict[str, Any]], PeftConfig] | None = None
    settings: frozenset[str] = frozenset()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    is_cur: bool = False
    library: str = "peft"
    tags: tuple[str, ...] = ()

    @property
    def trains_all_weights(self) -> bool:
        """Whether there is no adapter: weights of the base change, all or those that are named."""
        return self.peft_config is None


METHODS = Registry[Method]("method")
"""The registered methods by name; an unknown name raises."""


def register_method(name: str, method: Method) -> None:
    """Make ``method`` known as ``--method NAME``.

    Raises:
        ConfigError: the name is taken.
    """
    METHODS.add(name, method)
