"""The rules that choose an adapter's rows and columns, and the registry that holds them.

A new rule is one function with the decorator :func:`register_rule`, here or anywhere else.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from secura_serve.errors import ConfigError
from secura_serve.registry import Registry

__all__ = [
    "CALIBRATED",
    "Rule",
    "get_rule",
    "order_indices",
    "register_rule",
    "rule_names",
    "selection_problem",
    "uniform_numbers",
]

CALIBRATED = "calibrated"
"""The rule whose ranking was measured on the base's own text, and stands in a file."""

Rule = Callable[[np.ndarray, str], np.ndarray]
"""``(p, key) -> scores``, both ``(n,)``: the smallest scores are chosen first.

``p`` are the relative squared norms of the rows or columns, float32; ``key`` names seed, module
and axis, so that :func:`uniform_numbers` of it are the same on every machine.
"""

_RULES: Registry[Rule] = Registry("selection rule")


def register_rule(name: str) -> Callable[[Rule], Rule]:
    """Return a decorator that makes a function available as the selection rule ``name``.

    Raises:
        ConfigError: (the decorator) the name is taken.
    """

    def add(rule: Rule) -> Rule:
        _RULES.add(name, rule)
        return rule

    return add


def get_rule(name: str) -> Rule:
    """Return the rule called ``name``. Raises ConfigError that lists the names there are."""
    return _RULES[name]


def rule_names() -> tuple[str, ...]:
    """Return the names of all rules."""
    return _RULES.names()


def uniform_numbers(n: int, key: str) -> np.ndarray:
    """Return ``n`` numbers in (0, 1) from Philox keyed by SHA-256 of ``key``.

    Taken from the bit generator's raw words: NumPy promises that stream for ever, and does not
    promise what ``Generator.random`` makes of it.
    """
    digest = hashlib.sha256(key.encode()).digest()
    raw = np.random.Philox(key=int.from_bytes(digest[:16], "little")).random_raw(n)
    return ((raw >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


@register_rule("inverse_sampled")
def _inverse_sampled(p: np.ndarray, key: str) -> np.ndarray:
    """Draw without replacement with probability ``∝ 1/p`` (CURLoRA, arXiv 2408.14572, eq. 4).

    One exponential race: ``−ln(u_j)·p_j``, smallest first.
    """
    scores: np.ndarray = -np.log(uniform_numbers(len(p), key)) * p.astype(np.float64)
    return scores


@register_rule("lowest_norm")
def _lowest_norm(p: np.ndarray, key: str) -> np.ndarray:
    """Take the smallest norms (SECURA's choice, arXiv 2502.18168)."""
    scores: np.ndarray = p.astype(np.float64)
    return scores


@register_rule(CALIBRATED)
def _calibrated(p: np.ndarray, key: str) -> np.ndarray:
    """Refuse: W alone does not say which outputs are quiet."""
    raise ConfigError(
        f"selection rule {CALIBRATED!r} ranks by what was measured, so it needs a basis file: "
        "secura-train makes one or takes --basis FILE, in Python it is "
        "SecuraConfig(basis=load_basis(FILE))"
    )


def selection_problem(selection: Any) -> str | None:
    """Return what an adapter's ``selection`` must be where it is not that, or None.

    It holds ``rule`` and ``seed``, and with rule :data:`CALIBRATED` also ``basis``, the digest of
    the basis file.
    """
    fine = (
        isinstance(selection, Mapping)
        and selection.keys() - {"basis"} == {"rule", "seed"}
        and selection["rule"] in _RULES
        and isinstance(selection["seed"], int)
        and not isinstance(selection["seed"], bool)
        and ("basis" in selection) == (selection["rule"] == CALIBRATED)
        and re.fullmatch(r"[0-9a-f]{32}", str(selection.get("basis", "0" * 32))) is not None
    )
    if fine:
        return None
    return (
        f"an object with rule ({' | '.join(_RULES)}) and integer seed; rule {CALIBRATED} also "
        "needs basis, the 32 hexadecimal digits of its basis file, and no other rule has it"
    )


def order_indices(p: np.ndarray, rule: str, key: str) -> np.ndarray:
    """Return all indices, the first choice in front; zero-norm ones last, ties by index.

    Raises:
        ConfigError: the rule is not registered, or its scores are not one number an index.
    """
    scores = np.asarray(_RULES[rule](p, key))
    if scores.shape != p.shape or np.isnan(scores).any():
        raise ConfigError(
            f"selection rule {rule!r} must give one score for each of {len(p)} indices, without "
            f"NaN; it gave an array of shape {scores.shape}"
        )
    order: np.ndarray = np.lexsort((np.arange(len(p)), scores, p == 0))
    return order
