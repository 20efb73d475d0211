"""Loading and unloading adapters while the server runs, in the place of vLLM's own two routes.

    curl localhost:8000/v1/load_lora_adapter -H 'Content-Type: application/json' \\
      -d '{"lora_name": "x", "lora_path": "x"}'

vLLM's handlers take any name and any path, ask the Hugging Face hub for what is no path, and
answer a refused adapter with 500. Ours take a folder directly below ``--adapters`` under its own
name, check it against the base as the start does, and answer in vLLM's shapes. They exist only
where ``VLLM_ALLOW_RUNTIME_LORA_UPDATING`` is set, and are for the operator (see ``guard.py``).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Depends, FastAPI
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from pydantic import BaseModel

from secura_serve.adapter import check_name
from secura_serve.errors import AdapterError, ConfigError, FoldError, SecuraError
from secura_serve.serve.app.adapters.snapshots import Snapshot
from secura_serve.serve.app.folding import Folding
from secura_serve.serve.app.http.errors import error_response

__all__ = ["AdapterLoading", "contained"]

_SHOWN = 200


class Load(BaseModel):
    """Body of ``POST /v1/load_lora_adapter``, as vLLM has it."""

    lora_name: str
    lora_path: str
    load_inplace: bool = False
    is_3d_lora_weight: bool = False


class Unload(BaseModel):
    """Body of ``POST /v1/unload_lora_adapter``, as vLLM has it."""

    lora_name: str
    lora_int_id: int | None = None


def contained(root: Path, name: str, path: str) -> Path:
    """Return the adapter folder that a request names, with every link followed.

    Args:
        root: the ``--adapters`` folder.
        name: what the adapter is to be called: the folder's own name.
        path: absolute, relative to the working directory, or the folder's name alone.

    Raises:
        ConfigError: the name is not allowed, or this is no folder directly below ``root``. Whether
            something is there elsewhere is not told.
    """
    check_name(name)
    home = root.resolve()
    try:
        given = Path(path)
        folder = (home / given if len(given.parts) == 1 else given).resolve(strict=True)
        inside = folder.is_dir() and folder.parent == home
        # A folder of links would have other files read under the adapter's name.
        inside = inside and all(file.resolve().parent == folder for file in folder.iterdir())
    except (OSError, ValueError, RuntimeError):
        inside = False
    if not inside:
        raise ConfigError(
            f"lora_path {path[:_SHOWN]!r} is no adapter folder directly below {root} (the "
            "server's --adapters), with its files in it and no links out of it"
        )
    if folder.name != name:
        raise ConfigError(
            f"lora_name {name!r}: an adapter is called what its folder is called, {folder.name!r}"
        )
    return folder


class AdapterLoading:
    """The two routes, and what they need to know.

    Args:
        root: the ``--adapters`` folder; None if the server was started without one.
        names: what the base is called.
        verify: adapter folder -> the checked copy to serve it from; raises SecuraError.
        folding: what is folded.
    """

    def __init__(
        self,
        root: Path | None,
        names: Sequence[str],
        verify: Callable[[Path], Snapshot],
        folding: Folding,
    ) -> None:
        self.root, self.names, self.verify, self.folding = root, names, verify, folding
        self._models: Any = None
        self._one_at_a_time = asyncio.Lock()

    def bind(self, models: Any) -> None:
        """Take hold of vLLM's ``OpenAIServingModels`` once it is there."""
        self._models = models

    def attach(self, app: FastAPI) -> None:
        """Put the routes in the place of vLLM's."""
        from vllm.entrypoints.serve.utils.api_utils import validate_json_request

        router = APIRouter(dependencies=[Depends(validate_json_request)])
        for path, handler in (
            ("/v1/load_lora_adapter", self.load),
            ("/v1/unload_lora_adapter", self.unload),
        ):
            router.add_api_route(path, handler, methods=["POST"], response_model=None)
        app.include_router(router)

    async def load(self, body: Load) -> Response:
        """Check an adapter and serve it under its folder's name.

        With ``load_inplace`` a loaded one is replaced by what its folder holds now; requests that
        run keep the old one, and those that come in between get a 404.
        """
        return await self._answer(self._load(body))

    async def unload(self, body: Unload) -> Response:
        """Stop answering to an adapter's name; requests that run are finished."""
        return await self._answer(self._unload(body))

    async def _answer(self, work: Any) -> Response:
        # A client that goes away must not leave the work half done.
        task = asyncio.ensure_future(self._alone(work))
        try:
            return PlainTextResponse(await asyncio.shield(task))
        except (ConfigError, AdapterError) as error:
            return error_response(400, str(error), kind="InvalidUserInput")
        except FoldError as error:
            return error_response(409, str(error))
        except SecuraError as error:
            return error_response(503, str(error))
        except _Refused as refused:
            return JSONResponse(refused.body, refused.status)

    async def _alone(self, work: Any) -> str:
        """Do the work while no other load and no fold is under way, and nothing is folded."""
        try:
            async with self._one_at_a_time, self.folding.unfolded():
                return str(await work)
        finally:
            work.close()

    async def _load(self, body: Load) -> str:
        from vllm.entrypoints.serve.lora.protocol import LoadLoRAAdapterRequest

        name = check_name(body.lora_name)
        if self.root is None:
            raise ConfigError("this server was started without --adapters, so it can load none")
        if name in self.names:
            raise ConfigError(f"{name!r} is the base model's name; rename the folder")
        folder = await asyncio.to_thread(contained, self.root, name, body.lora_path)
        loaded = self._models.lora_requests
        if name in loaded and not body.load_inplace:
            raise ConfigError(
                f"{name!r} is loaded already; unload it first, or set 'load_inplace' to true"
            )
        snapshot = await asyncio.to_thread(self.verify, folder)
        # Under a new number, so that what runs under the old one keeps its weights.
        before = loaded.pop(name, None)
        try:
            request = LoadLoRAAdapterRequest(
                lora_name=name,
                lora_path=str(snapshot.path),
                is_3d_lora_weight=body.is_3d_lora_weight,
            )
            said = self._text(
                await self._models.load_lora_adapter(request, base_model_name=self.names[0])
            )
            self.folding.serve_from(name, snapshot)
            return said
        except BaseException:
            if before is not None:
                loaded[name] = before
            raise

    async def _unload(self, body: Unload) -> str:
        from vllm.entrypoints.serve.lora.protocol import UnloadLoRAAdapterRequest

        name = check_name(body.lora_name)
        said = self._text(
            await self._models.unload_lora_adapter(UnloadLoRAAdapterRequest(lora_name=name))
        )
        self.folding.forget(name)
        return said

    def _text(self, answer: Any) -> str:
        """Return vLLM's success as text; raise its refusals."""
        if isinstance(answer, str):
            return answer
        body = answer.model_dump()
        status = int(body["error"]["code"])
        if status >= 500:
            # What the workers refuse. An engine that is gone is another matter.
            gone = bool(getattr(self._models.engine_client, "errored", False))
            status = 503 if gone else 400
            kind = "ServiceUnavailableError" if gone else "InvalidUserInput"
            body["error"] |= {"code": status, "type": kind}
        raise _Refused(status, body)


class _Refused(Exception):
    """An error of vLLM's, on its way to the client."""

    def __init__(self, status: int, body: dict[str, Any]) -> None:
        self.status, self.body = status, body
        super().__init__(status)
