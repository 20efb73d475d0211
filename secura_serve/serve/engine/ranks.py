"""Calls that every rank of an engine answers, whichever of them fails."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

from vllm.logger import init_logger

from secura_serve.errors import ServeError
from secura_serve.serve import compat

__all__ = ["on_every_rank"]

logger = init_logger("vllm.secura_serve")

P = ParamSpec("P")
R = TypeVar("R")


def on_every_rank(
    method: Callable[Concatenate[Any, P], R],
) -> Callable[Concatenate[Any, P], R | None]:
    """Have a worker's method that fails on any rank raise on the last one, and there alone.

    vLLM hears the ranks in order, up to the first that raises, and takes what the others say for
    the answers to its next call. So every method that it calls on all ranks needs this.
    """

    @wraps(method)
    def together(worker: Any, /, *args: P.args, **kwargs: P.kwargs) -> R | None:
        try:
            answer = method(worker, *args, **kwargs)
        except Exception as error:
            compat.gather_rank_errors(str(error) or repr(error))
            if compat.is_last_rank(worker):
                raise
            logger.exception("%s failed on this rank", method.__name__)
            return None
        if (errors := compat.gather_rank_errors(None)) and compat.is_last_rank(worker):
            raise ServeError("; ".join(sorted(errors)))
        return answer

    return together
