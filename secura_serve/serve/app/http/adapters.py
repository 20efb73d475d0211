"""The routes of the adapters' life cycle, and vLLM's two older ones on top of it.

    curl localhost:8000/v1/adapters
    curl localhost:8000/v1/adapters/x/changes
    curl -X PUT localhost:8000/v1/adapters/x -F f=@x/adapter_config.json \\
      -F f=@x/adapter_model.safetensors
    curl -X POST localhost:8000/v1/adapters/x/rollback
    curl localhost:8000/v1/load_lora_adapter -H 'Content-Type: application/json' \\
      -d '{"lora_name": "x", "lora_path": "x"}'

Who may ask which is decided in ``guard.py``: reading is for users, changing for the operator.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from enum import Enum
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import PlainTextResponse, Response
from pydantic import BaseModel, ConfigDict, Field

from secura_serve.adapter import check_name
from secura_serve.errors import AdapterError, ConfigError, SecuraError
from secura_serve.serve.app.http.adapter_reads import (
    Context,
    get_adapter,
    get_changes,
    list_adapters,
    refused,
    shown,
)
from secura_serve.serve.app.http.bodies import read_files, read_upload
from secura_serve.serve.app.http.errors import error_response

__all__ = ["attach", "contained"]

_SHOWN = 200


class Rollback(BaseModel):
    """Body of ``POST /v1/adapters/NAME/rollback``; may be left out."""

    model_config = ConfigDict(extra="forbid")
    version: str | None = Field(
        default=None, description="digest of the version, or six or more of its first digits"
    )


class Pin(BaseModel):
    """Body of ``POST /v1/adapters/NAME/pin``; may be left out."""

    model_config = ConfigDict(extra="forbid")
    pinned: bool = Field(default=True, strict=True, description="false unpins")


class Alias(BaseModel):
    """Body of ``PUT /v1/aliases/ALIAS``."""

    model_config = ConfigDict(extra="forbid")
    adapter: str = Field(description="NAME, or NAME@DIGEST for one version")


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


async def _finished(work: Coroutine[Any, Any, Any]) -> Any:
    """Await work that a client who goes away must not leave half done."""
    return await asyncio.shield(asyncio.ensure_future(work))


async def put_adapter(name: str, request: Request, context: Context) -> Any:
    """Take an adapter's files (multipart), write them into the adapters folder, and serve them.

    The parts are named by their filenames: ``adapter_config.json`` and
    ``adapter_model.safetensors``, and ``README.md`` and ``train.json`` if you like. A refused
    upload changes nothing.
    """
    try:
        check_name(name)
        files = await read_files(request)
        await _finished(context.updates.upload(name, files))
        return await shown(context, name)
    except SecuraError as error:
        return refused(error)


async def put_weights(name: str, request: Request, context: Context) -> Any:
    """Take new U for an adapter (a safetensors file) and serve them on its basis.

    The headers ``X-Secura-Basis`` (the ``basis.id`` of the adapter) and ``X-Secura-Magnorm``
    (sorted JSON) may name the basis that they were trained on and the norm; others are refused.
    """
    try:
        check_name(name)
        body = await read_upload(request)
        basis, magnorm = (request.headers.get(f"x-secura-{key}") for key in ("basis", "magnorm"))
        await _finished(context.updates.push(name, body, basis, magnorm))
        return await shown(context, name)
    except SecuraError as error:
        return refused(error)


async def delete_adapter(name: str, context: Context) -> Any:
    """Remove an adapter's folder and serve it no longer; requests that run are finished."""
    try:
        check_name(name)
        await _finished(context.updates.delete(name))
    except SecuraError as error:
        return refused(error)
    return {"id": name, "object": "adapter", "deleted": True}


async def rollback(name: str, context: Context, body: Rollback | None = None) -> Any:
    """Serve an older version: the one before, or the one that is named."""
    try:
        await _finished(context.updates.rollback(name, (body or Rollback()).version))
        return await shown(context, name)
    except SecuraError as error:
        return refused(error)


async def pin(name: str, context: Context, body: Pin | None = None) -> Any:
    """Keep an adapter in a slot, whichever version its name stands for, or no longer."""
    try:
        await _finished(context.updates.pin(name, (body or Pin()).pinned))
        return await shown(context, name)
    except SecuraError as error:
        return refused(error)


async def reload(context: Context) -> Any:
    """Compare the adapters folder with what is served, and bring it up to date."""
    if context.watch is None:
        return error_response(409, "this server was started without --adapters")
    try:
        return {"object": "reload", "changes": await _finished(context.watch.reload())}
    except SecuraError as error:
        return refused(error)


async def put_alias(alias: str, body: Alias, context: Context) -> Any:
    """Let another name stand for an adapter, or for one version of it."""
    try:
        await _finished(context.updates.set_alias(alias, body.adapter))
    except SecuraError as error:
        return refused(error)
    return {"id": alias, "object": "alias", "adapter": body.adapter}


async def delete_alias(alias: str, context: Context) -> Any:
    """Forget an alias."""
    try:
        await _finished(context.updates.set_alias(alias, None))
    except SecuraError as error:
        return refused(error)
    return {"id": alias, "object": "alias", "deleted": True}


async def load_lora_adapter(body: Load, context: Context) -> Response:
    """Serve an adapter folder below ``--adapters`` under its name, as vLLM's own route does.

    With ``load_inplace`` a loaded one is replaced by what its folder holds now; requests that run
    keep the old version.
    """
    updates = context.updates
    try:
        name = check_name(body.lora_name)
        if updates.root is None:
            raise ConfigError("this server was started without --adapters, so it can load none")
        await asyncio.to_thread(contained, updates.root, name, body.lora_path)
        if updates.library.find(name) is not None and not body.load_inplace:
            raise ConfigError(
                f"{name!r} is loaded already; unload it first, or set 'load_inplace' to true"
            )
        version = await _finished(updates.from_folder(name))
        if not version.per_request:
            raise ConfigError(
                f"{name} answers only while it is folded into the weights: POST to /admin/fold"
            )
    except (ConfigError, AdapterError) as error:
        return error_response(400, str(error), kind="InvalidUserInput")
    except SecuraError as error:
        return refused(error)
    return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")


async def unload_lora_adapter(body: Unload, context: Context) -> Response:
    """Serve an adapter no longer; its folder stays, and requests that run are finished."""
    try:
        name = check_name(body.lora_name)
        await _finished(context.updates.remove(name))
    except ConfigError as error:
        return error_response(400, str(error), kind="InvalidUserInput")
    except SecuraError as error:
        return refused(error)
    return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")


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


_ROUTES = (
    ("/v1/adapters", "GET", list_adapters),
    ("/v1/adapters/reload", "POST", reload),
    ("/v1/adapters/{name}", "GET", get_adapter),
    ("/v1/adapters/{name}", "PUT", put_adapter),
    ("/v1/adapters/{name}", "DELETE", delete_adapter),
    ("/v1/adapters/{name}/changes", "GET", get_changes),
    ("/v1/adapters/{name}/weights", "PUT", put_weights),
    ("/v1/adapters/{name}/rollback", "POST", rollback),
    ("/v1/adapters/{name}/pin", "POST", pin),
    ("/v1/aliases/{alias}", "PUT", put_alias),
    ("/v1/aliases/{alias}", "DELETE", delete_alias),
    ("/v1/load_lora_adapter", "POST", load_lora_adapter),
    ("/v1/unload_lora_adapter", "POST", unload_lora_adapter),
)


def attach(app: FastAPI) -> None:
    """Add the routes, in the place of those of vLLM's that have the same paths."""
    tags: list[str | Enum] = ["adapters"]
    for path, method, handler in _ROUTES:
        app.add_api_route(path, handler, methods=[method], response_model=None, tags=tags)
