"""The adapters' life cycle without an engine: its parts, its routes, and an engine's stand-in.

Whatever is on this side of ``collective_rpc`` is real, vLLM's table of models included.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from safetensors.torch import save
from torch import Tensor

from secura_serve import adapter as A
from secura_serve.checkpoint import Checkpoint
from secura_serve.errors import SecuraError
from secura_serve.serve.app.adapters.content.snapshots import SnapshotStore
from secura_serve.serve.app.adapters.content.verifier import Verifier
from secura_serve.serve.app.adapters.library import Library
from secura_serve.serve.app.adapters.state import StateFile
from secura_serve.serve.app.adapters.updates import AdapterUpdates
from secura_serve.serve.app.adapters.watch import FolderWatch
from secura_serve.serve.app.adapters.workers import Workers


class RecordedEngine:
    """In the engine's place: answers as ``AdapterCalls`` would, and records what it was asked.

    Like a worker it reads an adapter's files when it prepares it, once for each path.
    """

    def __init__(self) -> None:
        self.model_config = SimpleNamespace(max_model_len=1, model="base")
        self.renderer = self.input_processor = None
        self.engine_core = SimpleNamespace(core_engines=(0,))
        self.errored = False
        self.refuses: str | None = None
        """Why every adapter is refused from now on."""
        self.raises: Exception | None = None
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.kept: dict[str, A.Adapter] = {}
        self.pinned: set[int] = set()
        self.free_slots = 4
        self.places: dict[int, str] = {}
        """Place -> the delta image that is in it, whole and published."""
        self.filling = asyncio.Event()
        """A place is filled only while this is set."""
        self.filling.set()

    async def collective_rpc(self, method: str, args: tuple[Any, ...] = (), **how: Any) -> Any:
        await asyncio.sleep(0)
        if method == "secura_fill":
            await self.filling.wait()
        if self.raises is not None:
            raise self.raises
        self.calls.append((method, args))
        return [getattr(self, method)(*args)]

    def called(self, method: str) -> list[tuple[Any, ...]]:
        return [args for name, args in self.calls if name == method]

    def secura_fill(self, place: int, image: str, first: int, last: int) -> str | None:
        self.places.pop(place, None)
        return self.refuses

    def secura_publish(self, place: int, image: str) -> None:
        self.places[place] = image

    def secura_prepare(self, adapters: Any, norm_bounds: Any) -> list[str | None]:
        answers: list[str | None] = []
        for _, path in adapters:
            answers.append(self.refuses)
            if self.refuses is None and path not in self.kept:
                try:
                    self.kept[path] = A.load(path)
                except SecuraError as error:
                    answers[-1] = str(error)
        return answers

    def secura_forget(self, numbers: list[int], paths: list[str]) -> None:
        for path in paths:
            self.kept.pop(path, None)

    def secura_slots(self) -> tuple[list[int], int, int]:
        return sorted(self.pinned), 0, 0

    def secura_pin(self, name: str, number: int, path: str, pinned: bool) -> str | None:
        if not pinned:
            self.pinned.discard(number)
        elif len(self.pinned | {number}) >= self.free_slots:
            return "one slot must stay free for the other adapters"
        else:
            self.pinned.add(number)
        return None


@dataclass
class House:
    """The life cycle of one server: everything below ``root``."""

    root: Path
    base: Path
    folder: Path
    engine: RecordedEngine
    library: Library
    store: SnapshotStore
    updates: AdapterUpdates
    watch: FolderWatch
    said: list[str] = field(default_factory=list)

    def fill(self) -> None:
        """Do what a start does with the folder's content and the state."""
        from secura_serve.serve.app.adapters.content.catalog import scan

        catalog = scan(
            self.folder, Checkpoint(self.base), taken=["base"], verifier=self.updates.verifier
        )
        self.updates.fill(catalog.entries)

    def serving(self, name: str) -> A.Adapter:
        """Return what the engine has read for a model name."""
        version = self.library.find(name)
        assert version is not None, f"{name} is not served"
        return self.engine.kept[str(version.snapshot.path)]


def house(root: Path, base: Path, *, keep: int = 3, state: bool = True) -> House:
    """Put the parts together below ``root``, as ``start.py`` does; nothing is read yet."""
    folder, said = root / "adapters", list[str]()
    folder.mkdir(parents=True, exist_ok=True)
    store = SnapshotStore(root / "copies")
    verifier = Verifier(lambda: Checkpoint(base), store)
    library = Library(["base"], keep=keep)
    file = StateFile(root / "state" / "state.json") if state else None
    updates = AdapterUpdates(folder, library, verifier, file, say=said.append)
    engine = RecordedEngine()
    updates.residency.workers = Workers(engine, lambda: verifier.norm_bounds)
    watch = FolderWatch(folder, updates, said.append)
    return House(root, base, folder, engine, library, store, updates, watch, said)


@contextmanager
def serving_app(parts: House) -> Iterator[Any]:
    """Yield a client of the routes on one event loop, and vLLM's table of models (``models``)."""
    from fastapi import FastAPI
    from starlette.testclient import TestClient
    from vllm.entrypoints.openai.models.protocol import BaseModelPath
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels
    from vllm.entrypoints.serve.exception_handling.register import init_exception_handler

    from secura_serve.serve.app.adapters.attach_to_engine import attach_to_engine
    from secura_serve.serve.app.answers import Answers
    from secura_serve.serve.app.folding import Folding
    from secura_serve.serve.app.http import adapters
    from secura_serve.serve.app.http.access import Keys
    from secura_serve.serve.app.http.context import ServerContext
    from secura_serve.serve.app.http.errors import answer_http_errors

    engine: Any = parts.engine
    models = OpenAIServingModels(engine, [BaseModelPath(name="base", model_path=str(parts.base))])
    folding = Folding(parts.base, Answers(["base"], parts.library))
    context = ServerContext(folding, parts.updates, Keys(), watch=parts.watch, follow=False)
    app = FastAPI()
    app.state.args = SimpleNamespace(log_error_stack=False)
    app.state.openai_serving_models = models
    context.hand_over(app.state.args)
    answer_http_errors(app)
    adapters.attach(app)
    init_exception_handler(app)
    with TestClient(app, raise_server_exceptions=False) as client:
        assert client.portal is not None
        client.portal.call(attach_to_engine, context, engine, models)
        yield SimpleNamespace(client=client, models=models, folding=folding, context=context)


def files_of(folder: Path) -> dict[str, bytes]:
    """Return the content of an adapter's two files by name."""
    names = ("adapter_config.json", "adapter_model.safetensors")
    return {name: (folder / name).read_bytes() for name in names}


def multipart(files: dict[str, bytes]) -> list[tuple[str, tuple[str, bytes]]]:
    """Return files as the test client wants them."""
    return [("file", (name, content)) for name, content in files.items()]


def cores(adapter: A.Adapter, change: float = 1.0) -> dict[str, Tensor]:
    """Return what a trainer pushes: the U of every module, times ``change``."""
    prefix = "base_model.model."
    return {f"{prefix}{n}.secura_U": cur.U * change for n, cur in adapter.modules.items()}


def pushed(adapter: A.Adapter, change: float = 1.0) -> bytes:
    """Return :func:`cores` as a body."""
    return save(cores(adapter, change))
