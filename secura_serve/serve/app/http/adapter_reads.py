"""What the routes of the adapters tell: all of them, one, and how far one moves the base."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import Depends, Request
from fastapi.responses import JSONResponse

from secura_serve.errors import (
    AdapterError,
    ConfigError,
    LifecycleError,
    SecuraError,
    StorageError,
)
from secura_serve.serve.app.adapters.describe import describe
from secura_serve.serve.app.http.context import ServerContext, context_of
from secura_serve.serve.app.http.errors import error_response
from secura_serve.suggest import did_you_mean

__all__ = ["Context", "get_adapter", "get_changes", "list_adapters", "refused", "shown"]


def _context(request: Request) -> ServerContext:
    return context_of(request.app)


Context = Annotated[ServerContext, Depends(_context)]


def refused(error: SecuraError) -> JSONResponse:
    """Return the answer for an error of the adapters' life cycle."""
    if isinstance(error, LifecycleError):
        status = error.status
    elif isinstance(error, StorageError):
        status = 507
    else:
        status = 400 if isinstance(error, (ConfigError, AdapterError)) else 503
    return error_response(status, str(error))


async def shown(context: ServerContext, name: str) -> dict[str, Any]:
    """Return one adapter as the API shows it."""
    resident = await context.updates.residency.numbers()
    return describe(
        context.updates.library, name, resident=resident, folded=context.answers.folded_version
    )


def _check_known(context: ServerContext, name: str) -> None:
    """Raise LifecycleError (404) unless there is an adapter of that name for whoever asks."""
    known = [each for each in context.updates.library.records if context.may_ask(each)]
    if name not in known:
        hint = did_you_mean(name, known)
        raise LifecycleError(404, f"there is no adapter {name[:100]!r}{hint}")


async def list_adapters(context: Context) -> dict[str, Any]:
    """Return every adapter with its versions, its state and what its card says."""
    resident, library = await context.updates.residency.numbers(), context.updates.library
    folded = context.answers.folded_version
    names = [name for name in library.records if context.may_ask(name)]
    cards = [describe(library, name, resident=resident, folded=folded) for name in names]
    return {"object": "list", "data": cards}


async def get_adapter(name: str, context: Context) -> Any:
    """Return one adapter."""
    try:
        _check_known(context, name)
    except LifecycleError as error:
        return refused(error)
    return await shown(context, name)


async def get_changes(name: str, context: Context) -> Any:
    """Return how far an adapter moves each linear: ‖W' − W‖ / ‖W‖, Frobenius norms.

    Of the version (`digest`) that the name stands for, in the order of the layers. The first
    request for a content reads the base's weights once, in the background, and waits for it.
    """
    try:
        _check_known(context, name)
        record = context.updates.library.record(name)
        if (version := record.serving) is None:
            raise LifecycleError(409, f"{name} changes nothing, it is refused: {record.refused}")
        modules = await context.changes.of(version)
    except LifecycleError as error:
        return refused(error)
    return {"id": name, "object": "changes", "digest": version.digest, "modules": modules}
