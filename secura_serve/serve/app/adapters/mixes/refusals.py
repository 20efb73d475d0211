"""Why a mix is not answered, and what to ask for instead."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from secura_serve.errors import MixError
from secura_serve.serve.app.adapters.library import Version
from secura_serve.serve.app.adapters.mixes.canonical_mix import combine
from secura_serve.serve.app.adapters.mixes.grammar import parse
from secura_serve.serve.app.http.admission import Refusal

if TYPE_CHECKING:
    from secura_serve.serve.app.folding import Folding

__all__ = ["refuse_mix"]

_SHOWN = 100


def refuse_mix(folding: Folding, text: str) -> Refusal | None:
    """Return why a mix cannot be answered now, or None if it can.

    Whether the key of the request may ask every part comes before anything that the parts would
    tell about themselves.

    Args:
        text: an expression that is no model's name.
    """
    try:
        parts = parse(text)
        for part in parts:
            if (refusal := _unknown(folding, text, part.model)) is not None:
                return refusal
        canonical = combine(parts, folding.library)
    except MixError as error:
        return Refusal(error.status, str(error))
    if canonical.nothing and not folding.may_ask(None):
        return Refusal(404, folding.unknown(folding.names[0]))
    if folding.folded is not None:
        return folding.blocked(text[:_SHOWN])
    if not folding.per_request:
        return Refusal(
            409,
            f"{text[:_SHOWN]}: this engine takes no adapters per request, and so no mixes; merge "
            "them into a checkpoint with secura-merge",
        )
    if canonical.alone is not None:
        return folding.refusal(str(canonical.alone))
    return _uncombinable(text, [version for version, _ in canonical.parts])


def _unknown(folding: Folding, text: str, model: str) -> Refusal | None:
    """Return the refusal of a part that does not exist for whoever asks."""
    if model in folding.names and folding.may_ask(model):
        return Refusal(
            400,
            f"{model} is the base, which every mix is added to with weight 1: leave it out of "
            f"{text[:_SHOWN]}",
        )
    if folding.may_ask(model) and folding.library.find(model) is not None:
        return None
    return Refusal(404, f"The mix `{text[:_SHOWN]}` cannot be answered: {folding.unknown(model)}")


def _uncombinable(text: str, versions: Sequence[Version]) -> Refusal | None:
    """Return why these adapters have no weighted sum that this server can answer with, or None."""
    problems = []
    for version in versions:
        adapter = version.entry.adapter
        if adapter is None:
            kind = "plain LoRA" if version.entry.lora is not None else "whole fine-tune"
            problems.append(
                f"{version.name} is a {kind}, which has no U to be summed: ask for it alone, or "
                "leave it out"
            )
        elif not adapter.config.magnorm.combinable:
            problems.append(
                f"{version.name} has S-MagNorm {adapter.config.magnorm.mode!r}, which is defined "
                "for one adapter as it was trained: ask for it alone"
            )
    if problems:
        return _refusal(400, text, problems)
    norms = {str(v.entry.adapter.config.magnorm.to_json()): v for v in versions if v.entry.adapter}
    if len(norms) > 1:
        each = "; ".join(f"{v.name}: {norm}" for norm, v in norms.items())
        return _refusal(
            400,
            text,
            [
                "S-MagNorm acts on the total update, so all parts must have the same mode and "
                f"parameters; got {each}. Mix those that are alike"
            ],
        )
    if not all(version.entry.per_request for version in versions):
        return _normed(text, versions)
    return None


def _normed(text: str, versions: Sequence[Version]) -> Refusal | None:
    """Return why adapters of one norm that makes the sum full-rank are not mixed here, or None."""
    if all(version.image is not None for version in versions):
        return None
    norm = versions[0].entry.adapter.config.magnorm.mode if versions[0].entry.adapter else None
    return _refusal(
        409,
        text,
        [
            f"S-MagNorm {norm!r} acts on the sum and makes it full-rank, and this server has no "
            "place for it: restart it with --resident above 0, or merge them with secura-merge "
            "(--adapter NAME*WEIGHT) and serve the result"
        ],
    )


def _refusal(status: int, text: str, problems: Sequence[str]) -> Refusal:
    return Refusal(status, f"{text[:_SHOWN]} is no mix that can be answered: {'; '.join(problems)}")
