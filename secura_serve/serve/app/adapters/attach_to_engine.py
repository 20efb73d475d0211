"""From a catalog to adapters that are served: what happens once the engine is there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from secura_serve.errors import LifecycleError, UnservableError
from secura_serve.serve.app.adapters.resident.guard import guard
from secura_serve.serve.app.adapters.table import AdapterTable
from secura_serve.serve.app.adapters.updates import AdapterUpdates
from secura_serve.serve.app.adapters.workers import Workers
from secura_serve.serve.compat import ListedModel, ServedModels

if TYPE_CHECKING:
    from secura_serve.serve.app.http.context import ServerContext

__all__ = ["prepare_all", "attach_to_engine"]


async def attach_to_engine(context: ServerContext, engine: Any, models: Any) -> None:
    """Have vLLM answer to the library's names, and follow the folder from now on.

    The workers prepare the adapters one after the other, while the server answers already; a
    request for one whose turn has not come has it prepared at once.

    Args:
        engine: vLLM's ``EngineClient``.
        models: vLLM's ``OpenAIServingModels``.

    Raises:
        UnservableError: ``--strict``, and a worker refuses an adapter.
    """
    updates, folding, answers = context.updates, context.folding, context.answers
    library = updates.library
    residency = updates.residency
    table = AdapterTable(library) if answers.per_request else {}

    def listed() -> Iterator[ListedModel]:
        for version in library:
            if context.may_ask(version.name):
                yield ListedModel(
                    version.name, version.snapshot.source, answers.status(version.name)
                )

    served = ServedModels(
        models, table, lambda: answers.status(answers.names[0]), listed, context.may_ask
    )
    await served.take_over()
    folding.bind(engine, served)
    if isinstance(table, AdapterTable):
        library.changed = table.update_name
        workers = Workers(engine, lambda: updates.verifier.norm_bounds, updates.observer)
        residency.workers = workers
        folding.admission.prepare = updates.preparation
        folding.admission.hold = updates.admit
        if residency.places is not None:
            residency.places.workers = workers
            guard(engine, residency.places)
            folding.admission.hold_all = residency.places.all_held
        if context.strict:
            await prepare_all(updates, strict=True)
        else:
            context.keep_running(prepare_all(updates))
    if context.watch is not None and context.follow:
        context.keep_running(context.watch.run())


async def prepare_all(updates: AdapterUpdates, *, strict: bool = False) -> None:
    """Prepare on the workers whatever the library has, one after the other.

    Args:
        strict: raise the first refusal, instead of serving without that adapter.

    Raises:
        UnservableError: see ``strict``.
    """
    library, residency = updates.library, updates.residency
    pinned = {name for name, record in library.records.items() if record.pinned}
    for version in sorted(library, key=lambda v: v.name not in pinned):
        places = residency.places
        if version.image is not None and places is not None and not places.has_room:
            # It gets a place when it is asked.
            continue
        work = updates.preparation(version.name)
        refused = await work if work is not None else None
        if refused is not None:
            if strict:
                raise UnservableError(f"--strict: {version.name} cannot be served: {refused}")
            updates.refuse(version, refused)
            continue
        record = library.records.get(version.name)
        if record is not None and record.pinned:
            try:
                await residency.pin(version, True)
            except LifecycleError as error:
                updates.say(f"{version.name} is not pinned: {error}")
