"""What the page asks a server besides chats: models, adapters, metrics, and changes of them.

Every request says that it comes through a page, by the header ``Via``. A server without an admin
key trusts direct requests of its own machine: the page may run there, its visitors do not. So such
a server refuses their changes, whatever they enter as a key.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

import httpx
import openai

from .endpoint import (
    LIST_S,
    VIA,
    Model,
    connect,
    encodable,
    explain,
    explain_response,
    list_models,
    without_login,
)

__all__ = ["Operator", "Refused", "Server", "Snapshot"]

Operator = Literal["key", "nobody"]
"""Who may change the server through the page: whoever has its admin key, or nobody."""

_FRESH_S = 1.5
_READ = httpx.Timeout(10, connect=4)
# A fold waits a minute for running requests, an upload for its check.
_CHANGE = httpx.Timeout(180, connect=4)


class Refused(Exception):
    """The server said no, or nothing; the text is a sentence for the visitor."""


@dataclass(frozen=True)
class Snapshot:
    """What the server had to offer a moment ago; ``problem`` is a sentence where it did not."""

    models: tuple[Model, ...] = ()
    adapters: tuple[Mapping[str, Any], ...] = ()
    operator: Operator = "nobody"
    problem: str | None = None

    @property
    def bases(self) -> list[str]:
        return [model.id for model in self.models if model.parent is None]

    @property
    def served(self) -> list[str]:
        """The names of the adapters that can be asked now."""
        return [model.id for model in self.models if model.parent is not None]

    @property
    def folded(self) -> Model | None:
        return next((model for model in self.models if model.folded), None)

    def card(self, name: str | None) -> Mapping[str, Any] | None:
        """Return what ``/v1/adapters`` says of one adapter."""
        return next((card for card in self.adapters if card["id"] == name), None)


@dataclass
class Server:
    """One server, as all visitors of the page see it: they share its snapshots."""

    client: openai.AsyncOpenAI
    answers: openai.AsyncOpenAI = field(init=False)
    """For chats alone: their thread has connections of its own."""
    _http: httpx.AsyncClient = field(init=False)
    _slow: httpx.AsyncClient = field(init=False)
    """For what takes minutes: it must not keep the connections that lists and metrics need."""
    _snapshot: Snapshot = field(default_factory=Snapshot)
    _taken: float = float("-inf")
    _lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    def __post_init__(self) -> None:
        self.answers = connect(str(self.client.base_url), self.client.api_key)
        # One for all: each would read the certificates of the system anew.
        trusted = httpx.create_ssl_context()
        self._http = httpx.AsyncClient(headers=VIA, timeout=_READ, verify=trusted)
        self._slow = httpx.AsyncClient(headers=VIA, timeout=_CHANGE, verify=trusted)

    @property
    def endpoint(self) -> str:
        """Its address as it may be shown."""
        return without_login(str(self.client.base_url)).rstrip("/")

    @property
    def _root(self) -> str:
        return str(self.client.base_url).rstrip("/").removesuffix("/v1")

    async def snapshot(self, *, fresh: bool = False) -> Snapshot:
        """Return what the server offers, at most one and a half seconds old."""
        async with self._lock:
            if fresh or time.monotonic() - self._taken > _FRESH_S:
                self._snapshot = await self._take()
                self._taken = time.monotonic()
            return self._snapshot

    async def _take(self) -> Snapshot:
        try:
            models = await list_models(self.client)
        except openai.OpenAIError as error:
            return Snapshot(problem=explain(error, self.endpoint))
        adapters, fold = await asyncio.gather(
            self._get("/v1/adapters", self._key), self._get("/admin/fold", None)
        )
        cards: Sequence[Any] = ()
        if adapters is not None and adapters.status_code == 200:
            cards = _list_of_cards(adapters)
        # 401 asks for a key; 403 says that there is none, 404 that this is another server.
        key_helps = fold is not None and fold.status_code == 401
        return Snapshot(tuple(models), tuple(cards), "key" if key_helps else "nobody")

    async def metrics(self) -> str:
        """Return the text of ``/metrics``. Raises Refused."""
        answer = await self._get("/metrics", self._key)
        if answer is None:
            raise Refused(f"No server answers at {self.endpoint}.")
        if answer.status_code != 200:
            raise Refused(explain_response(answer))
        return answer.text

    async def changes(self, name: str) -> dict[str, float]:
        """Return module -> ‖W'−W‖/‖W‖ of an adapter; a big base is read for minutes. Raises
        Refused."""
        answer = await self._get(f"{_path(name)}/changes", self._key, slow=True)
        if answer is None:
            raise Refused(f"No answer from {self.endpoint}: ask again.")
        if answer.status_code != 200:
            raise Refused(explain_response(answer))
        try:
            changes = {str(k): float(v) for k, v in answer.json()["modules"].items()}
        except (ValueError, KeyError, TypeError, AttributeError):
            changes = {}
        if not changes or not all(map(math.isfinite, changes.values())):
            raise Refused(f"{self.endpoint} told no changes of {name}.")
        return changes

    async def upload(self, key: str, name: str, files: Sequence[Path]) -> str:
        """Send an adapter's files; return a sentence. Raises Refused."""
        # Whoever has no key shall not have the page read and send what they like.
        await self._change(key, "GET", "/admin/fold")
        with ExitStack() as opened:
            once = dict.fromkeys(files)
            parts = [("file", (file.name, opened.enter_context(file.open("rb")))) for file in once]
            await self._change(key, "PUT", _path(name), files=parts)
        return f"{name} is served."

    async def pin(self, key: str, name: str, pinned: bool) -> str:
        await self._change(key, "POST", f"{_path(name)}/pin", json={"pinned": pinned})
        return f"{name} is kept in its slot." if pinned else f"{name} may leave its slot."

    async def rollback(self, key: str, name: str, version: str) -> str:
        await self._change(key, "POST", f"{_path(name)}/rollback", json={"version": version})
        return f"{name} is served as {version[:12]}."

    async def fold(self, key: str, name: str | None) -> str:
        """Fold an adapter into the weights, or with None take out what is there."""
        if name is None:
            await self._change(key, "POST", "/admin/unfold", json={})
            return "The weights are those of the base again."
        await self._change(key, "POST", "/admin/fold", json={"name": name})
        return f"{name} is folded: nothing else is answered until it is unfolded."

    async def delete(self, key: str, name: str) -> str:
        await self._change(key, "DELETE", _path(name))
        return f"{name} is deleted."

    async def _change(self, key: str, method: str, path: str, **content: Any) -> None:
        if not key:
            raise Refused("Enter the server's admin key first.")
        if not key.isascii() or not key.isprintable():
            raise Refused("This is no key: it holds characters that no header can.")
        headers = {"Authorization": f"Bearer {key}"}
        try:
            answer = await self._slow.request(method, self._root + path, headers=headers, **content)
        except httpx.HTTPError as error:
            raise Refused(f"No answer from {self.endpoint} ({type(error).__name__}).") from error
        if answer.status_code >= 400:
            raise Refused(explain_response(answer))

    @property
    def _key(self) -> str | None:
        return self.client.api_key

    async def _get(
        self, path: str, key: str | None, *, slow: bool = False
    ) -> httpx.Response | None:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        http, limit = (self._slow, None) if slow else (self._http, LIST_S)
        try:
            async with asyncio.timeout(limit):
                return await http.get(self._root + path, headers=headers)
        except (httpx.HTTPError, TimeoutError):
            return None


def _path(name: str) -> str:
    return f"/v1/adapters/{quote(name, safe='')}"


def _list_of_cards(answer: httpx.Response) -> list[Mapping[str, Any]]:
    try:
        # Written once more, so that no half of a character is in any of its texts.
        whole = encodable(json.dumps(answer.json()["data"], ensure_ascii=False))
        return [
            _card(each) for each in json.loads(whole, parse_int=_int) if isinstance(each["id"], str)
        ]
    except (ValueError, KeyError, TypeError, RecursionError):
        return []


def _int(digits: str) -> int | float:
    """Read a number; one that no adapter has becomes a float, which can always be written."""
    return int(digits) if len(digits) < 19 else float(digits)


def _card(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the entry without what has another type than the tabs read: any server may answer."""
    lists = {key: raw[key] for key in ("examples", "aliases", "versions") if key in raw}
    names = {key: raw[key] for key in ("scores", "retention", "recipe") if key in raw}
    cleaned: dict[str, Any] = {k: v if isinstance(v, list) else [] for k, v in lists.items()}
    cleaned |= {k: v if isinstance(v, dict) else {} for k, v in names.items()}
    for key in ("scores", "retention"):
        numbers = cleaned.get(key, {}).items()
        cleaned[key] = {k: v for k, v in numbers if isinstance(v, int | float)}
    cleaned["versions"] = [
        each
        for each in cleaned.get("versions", [])
        if isinstance(each, dict) and isinstance(each.get("digest"), str)
    ]
    return {**raw, **cleaned}
