"""Why adapters are not summed for a request, and what to ask for instead."""

from __future__ import annotations

from collections.abc import Sequence

from secura_serve.serve.app.adapters.library import Version
from secura_serve.serve.app.http.admission import Refusal

__all__ = ["SHOWN", "refuse_sum"]

SHOWN = 100
"""Characters of a mix that an error repeats."""


def refuse_sum(text: str, versions: Sequence[Version]) -> Refusal | None:
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
    return Refusal(status, f"{text[:SHOWN]} is no mix that can be answered: {'; '.join(problems)}")
