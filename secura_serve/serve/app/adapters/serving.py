"""From a catalog to adapters that are served: what happens once the engine is there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from secura_serve.serve.app.adapters.table import AdapterTable
from secura_serve.serve.app.adapters.workers import Workers
from secura_serve.serve.compat import ListedModel, ServedModels

if TYPE_CHECKING:
    from secura_serve.serve.app.http.context import ServerContext

__all__ = ["serve_adapters"]


async def serve_adapters(context: ServerContext, engine: Any, models: Any) -> None:
    """Have vLLM answer to the library's names, and follow the folder from now on.

    The workers prepare the adapters one after the other, while the server answers already; a
    request for one whose turn has not come has it prepared at once.

    Args:
        engine: vLLM's ``EngineClient``.
        models: vLLM's ``OpenAIServingModels``.

    Raises:
        UnservableError: ``--strict``, and a worker refuses an adapter.
    """
    updates, folding, library = context.updates, context.folding, context.updates.library
    table = AdapterTable(library) if folding.per_request else {}

    def listed() -> Iterator[ListedModel]:
        for version in library:
            if context.may_ask(version.name):
                yield ListedModel(
                    version.name, version.snapshot.source, folding.status(version.name)
                )

    served = ServedModels(
        models, table, lambda: folding.status(folding.names[0]), listed, context.may_ask
    )
    await served.take_over()
    folding.bind(engine, served)
    if isinstance(table, AdapterTable):
        library.changed = table.update_name
        updates.workers = Workers(engine, lambda: updates.verifier.norm_bounds, updates.observer)
        folding.admission.prepare = updates.preparation
        folding.admission.hold = updates.admit
        if updates.resident is not None:
            updates.resident.workers = updates.workers
            updates.resident.guard(engine)
            folding.admission.hold_all = updates.resident.all_held
        if context.strict:
            await updates.prepare_all(strict=True)
        else:
            context.keep_running(updates.prepare_all())
    if context.watch is not None and context.follow:
        context.keep_running(context.watch.run())
