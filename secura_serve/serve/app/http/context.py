"""What our routes and middleware need, on its way through vLLM's start.

vLLM makes plugins and middleware without arguments of ours. But it keeps the namespace that it was
started with on the app, as ``app.state.args``, and prints only what its own parser knows.
"""

from __future__ import annotations

import asyncio
from argparse import Namespace
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any

from secura_serve.checkpoint import Checkpoint
from secura_serve.errors import ServeError
from secura_serve.serve.app.adapters.changes import WeightChanges
from secura_serve.serve.app.adapters.updates import AdapterUpdates
from secura_serve.serve.app.adapters.watch import FolderWatch
from secura_serve.serve.app.answers import Answers
from secura_serve.serve.app.folding import Folding
from secura_serve.serve.app.http.access import Keys
from secura_serve.serve.app.metrics import Metrics
from secura_serve.serve.logs import say

__all__ = ["ServerContext", "context_of"]

_NAME = "secura_context"


@dataclass
class ServerContext:
    """The parts of one running server."""

    folding: Folding
    """Changes what is folded into the weights; says which requests may run."""
    updates: AdapterUpdates
    """What changes the adapters while the server runs."""
    keys: Keys
    """Who may ask which route."""
    watch: FolderWatch | None = None
    """Compares the adapters folder with what is served; None without one."""
    follow: bool = True
    """Whether changes of the folder are followed as they happen."""
    strict: bool = False
    """Whether an adapter that a worker refuses ends the start."""
    fold_at_start: str | None = None
    """The adapter to fold before the first request."""
    ready_notice: str = ""
    """What is printed once the server answers."""
    metrics: Metrics | None = None
    """What ``/metrics`` shows of ours."""
    shutdown: Any = None
    """How the server ends: :class:`~secura_serve.serve.app.lifecycle.draining.Shutdown`."""
    attached: bool = False
    """Whether our own routes and the admission of requests are in the app."""

    tasks: set[asyncio.Task[None]] = field(default_factory=set)
    """What runs beside the requests until the server ends."""
    changes: WeightChanges = field(init=False)
    """How far the adapters move the base."""

    def __post_init__(self) -> None:
        self.changes = WeightChanges(lambda: Checkpoint(self.folding.base))

    @property
    def answers(self) -> Answers:
        """What the server answers to, and who may ask for it."""
        return self.folding.answers

    def keep_running(self, work: Coroutine[Any, Any, None]) -> None:
        """Run something beside the requests; an error is reported, and ends nothing else."""
        task = asyncio.ensure_future(work)
        self.tasks.add(task)

        def done(task: asyncio.Task[None]) -> None:
            self.tasks.discard(task)
            if not task.cancelled() and (error := task.exception()) is not None:
                say(repr(error))

        task.add_done_callback(done)

    def may_ask(self, model: str) -> bool:
        """Return whether whoever asks now may ask this model."""
        return self.answers.may_ask(model)

    def hand_over(self, args: Namespace) -> None:
        """Put this where :func:`context_of` finds it in the app that vLLM makes of ``args``."""
        setattr(args, _NAME, self)


def context_of(app: Any) -> ServerContext:
    """Return the context of the app that vLLM made.

    Raises:
        ServeError: the app was not started by secura-serve.
    """
    context = getattr(getattr(app.state, "args", None), _NAME, None)
    if not isinstance(context, ServerContext):
        raise ServeError("the plugin secura_admin belongs to secura-serve; start that")
    return context
