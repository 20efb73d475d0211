"""An adapter as the API shows it."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from secura_serve.adapter.format import WEIGHTS_NAME
from secura_serve.serve.app.adapters.content.verifier import printable
from secura_serve.serve.app.adapters.library import Library, Version
from secura_serve.serve.basis import base_id

__all__ = ["describe"]

_CARD = ("task", "examples", "scores", "retention", "recipe", "lora_size")


def describe(
    library: Library, name: str, *, resident: Collection[int], folded: Version | None
) -> dict[str, Any]:
    """Return the JSON object of one adapter.

    ``state`` is ``resident`` (in a slot), ``known`` (gets a slot when it is asked for, or answers
    once it is folded), ``folded``, or ``refused`` (it has no version that can be served; ``reason``
    says why). ``reason`` is also set where a newer content was refused and an older one serves.

    Args:
        resident: numbers of the versions that are in a slot.
        folded: the version in the weights.
    """
    record = library.record(name)
    serving = record.serving
    described: dict[str, Any] = {
        "id": printable(name),
        "object": "adapter",
        "state": _state(serving, resident, folded),
        "reason": record.refused,
        "digest": serving.digest if serving else None,
        "pinned": record.pinned,
        "rolled_back": record.rolled_back_to is not None,
        "aliases": library.aliases_of(name),
        "versions": [
            {
                "digest": version.digest,
                "created": int(version.created),
                "origin": version.origin,
                "state": _state(version, resident, folded),
            }
            for version in record.versions
        ],
    }
    return described | (_content(serving) if serving else {})


def _state(version: Version | None, resident: Collection[int], folded: Version | None) -> str:
    if version is None:
        return "refused"
    if version is folded:
        return "folded"
    return "resident" if version.number in resident else "known"


def _size(version: Version) -> int | None:
    """Return the bytes of the weights; None if somebody has removed the copy."""
    try:
        return (version.snapshot.path / WEIGHTS_NAME).stat().st_size
    except OSError:
        return None


def _content(version: Version) -> dict[str, Any]:
    """Return what one version says of itself."""
    entry = version.entry
    adapter = entry.adapter or entry.lora or entry.fine_tune
    assert adapter is not None
    common = {
        "rank": adapter.r,
        "modules": len(adapter.modules),
        "size": adapter.file_size if entry.fine_tune is not None else _size(version),
        "mode": "per-request" if version.per_request else "fold",
        "source": str(version.snapshot.source),
        **{key: version.card.get(key) for key in _CARD},
    }
    if entry.adapter is None:
        return common | {"type": "lora" if entry.lora is not None else "full"}
    return common | {
        "type": "cur",
        "magnorm": entry.adapter.config.magnorm.mode,
        "basis": dict(entry.adapter.config.selection) | {"id": base_id(entry.adapter)},
    }
