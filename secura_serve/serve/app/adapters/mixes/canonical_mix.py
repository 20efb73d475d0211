"""What an expression stands for: versions of adapters with their weights, in canonical form."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from math import fsum

from secura_serve.errors import MixError
from secura_serve.serve.app.adapters.library import Library, Version
from secura_serve.serve.app.adapters.mixes.grammar import (
    Part,
    parse,
    spell,
    spell_weight,
    weight_problem,
)
from secura_serve.serve.mix_path import mix_path

__all__ = ["CanonicalMix", "combine", "canonical_mix_of"]


@dataclass(frozen=True)
class CanonicalMix:
    """A mix in canonical form: every version once, by engine name, none with weight 0.

    Two expressions mean the same if their :attr:`path` is the same.
    """

    parts: tuple[tuple[Version, float], ...]

    @property
    def nothing(self) -> bool:
        """Whether no update is left: this is the base."""
        return not self.parts

    @property
    def alone(self) -> Version | None:
        """The version that this is, if it is one adapter as it was trained; else None."""
        [(version, weight)] = self.parts if len(self.parts) == 1 else [(None, 0.0)]
        return version if weight == 1 else None

    @cached_property
    def path(self) -> str:
        """What the engine reads it by: contents and weights."""
        return mix_path((str(version.snapshot.path), weight) for version, weight in self.parts)

    @property
    def full_rank(self) -> bool:
        """Whether a norm acts on the sum, so that it needs a place for its whole update."""
        return not all(version.entry.per_request for version, _ in self.parts)

    @cached_property
    def shown(self) -> str:
        """What an answer calls its model: names and weights. As for a single adapter the versions
        are left out, unless two of one adapter are in it."""
        times = Counter(version.name for version, _ in self.parts)
        return spell(
            (str(version) if times[version.name] > 1 else version.name, weight)
            for version, weight in self.parts
        )

    @cached_property
    def engine_name(self) -> str:
        """What the engine calls it; as for an adapter, a digest stands behind the last ``@``."""
        content = "+".join(f"{v.engine_name}*{spell_weight(weight)}" for v, weight in self.parts)
        return f"{self.shown}@{hashlib.sha256(content.encode()).hexdigest()[:32]}"

    def has_any(self, engine_names: Iterable[str]) -> bool:
        """Return whether one of these versions is part of it."""
        return not {version.engine_name for version, _ in self.parts}.isdisjoint(engine_names)


def canonical_mix_of(text: str, library: Library) -> CanonicalMix:
    """Return what an expression stands for now.

    Raises:
        MixError: (400) it is not well-formed, or an adapter's weights add up to too much; (404) a
            part does not exist.
    """
    return combine(parse(text), library)


def combine(parts: Iterable[Part], library: Library) -> CanonicalMix:
    """Return the sum of parts. Weights of one version are added, whatever it was called.

    Raises:
        MixError: (400) a sum is no weight; (404) a part does not exist.
    """
    versions: dict[str, Version] = {}
    weights: defaultdict[str, list[float]] = defaultdict(list)
    for part in parts:
        version = library.find(part.model)
        if version is None:
            raise MixError(404, f"there is no adapter {part.model!r}")
        versions.setdefault(version.engine_name, version)
        weights[version.engine_name].append(part.weight)
    found = []
    for name in sorted(versions):
        # Rounded once, so that the order of the parts does not matter.
        weight = fsum(weights[name])
        if (problem := weight_problem(weight)) is not None:
            raise MixError(400, f"the weights of {versions[name].name} add up: {problem}")
        if weight != 0:
            found.append((versions[name], weight))
    return CanonicalMix(tuple(found))
