"""What our routes and middleware need, on its way through vLLM's start.

vLLM makes plugins and middleware without arguments of ours. But it keeps the namespace that it was
started with on the app, as ``app.state.args``, and prints only what its own parser knows.
"""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass
from typing import Any

from secura_serve.errors import ServeError
from secura_serve.serve.app.folding import Folding
from secura_serve.serve.app.http.access import Keys
from secura_serve.serve.app.http.loading import AdapterLoading

__all__ = ["ServerContext", "context_of"]

_NAME = "secura_context"


@dataclass
class ServerContext:
    """The parts of one running server."""

    folding: Folding
    """What is folded into the weights, and which requests may run."""
    loading: AdapterLoading
    """The routes that load and unload adapters at run time."""
    keys: Keys
    """Who may ask which route."""
    fold_at_start: str | None = None
    """The adapter to fold before the first request."""
    ready_notice: str = ""
    """What is printed once the server answers."""
    shutdown: Any = None
    """How the server ends: :class:`~secura_serve.serve.app.lifecycle.draining.Shutdown`."""
    attached: bool = False
    """Whether our own routes and the admission of requests are in the app."""

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
