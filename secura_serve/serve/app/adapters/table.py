"""The table in which vLLM looks an adapter's name up."""

from __future__ import annotations

from typing import Any

from secura_serve.serve.app.adapters.library import Library, Version
from secura_serve.serve.app.adapters.mixes.mixes import Mix, asked_mix
from secura_serve.serve.app.adapters.resident.slots import ADMITTED
from secura_serve.serve.compat import lora_request

__all__ = ["AdapterTable"]


class AdapterTable(dict[str, Any]):
    """Name -> ``LoRARequest`` of the version that the name stands for.

    Holds the plain names; aliases and ``name@digest`` are found as well, and not listed. What vLLM
    hashes its prefix cache by is in the request: the name and the path, which holds the digest.

    A mix is found while the request that was admitted for it is answered. One that comes down to
    the base is None, which is no adapter to vLLM.

    Args:
        library: followed by :meth:`update`.
    """

    def __init__(self, library: Library) -> None:
        super().__init__()
        self._library = library
        self._requests: dict[int, Any] = {}
        for name in library.records:
            self.update_name(name)

    def update_name(self, name: str) -> None:
        """Follow a change of one adapter."""
        record = self._library.records.get(name)
        serving = record.serving if record else None
        if serving is not None and serving.per_request:
            self[name] = self._request(serving)
        else:
            self.pop(name, None)
        known = {v.number for r in self._library.records.values() for v in r.versions}
        if len(self._requests) > 2 * len(known) + 16:
            self._requests = {n: r for n, r in self._requests.items() if n in known}

    def __contains__(self, model: object) -> bool:
        if super().__contains__(model) or self._version(model) is not None:
            return True
        return asked_mix(model) is not None

    def __getitem__(self, model: str) -> Any:
        if (admitted := ADMITTED.get()) is not None and admitted[0] == model:
            return self._request(admitted[1])
        return super().__getitem__(model)

    def __missing__(self, model: str) -> Any:
        if (version := self._version(model)) is not None:
            return self._request(version)
        if (asked := asked_mix(model)) is None:
            raise KeyError(model)
        [found] = asked
        if isinstance(found, Mix):
            canonical = found.canonical
            return lora_request(canonical.engine_name, found.number, found.engine_path)
        return None if found is None else self._request(found)

    def _version(self, model: object) -> Version | None:
        version = self._library.find(model) if isinstance(model, str) else None
        return version if version is not None and version.per_request else None

    def _request(self, version: Version) -> Any:
        if version.number not in self._requests:
            self._requests[version.number] = lora_request(
                version.engine_name, version.number, str(version.engine_path)
            )
        return self._requests[version.number]
