"""Every error this package raises on purpose, in one tree.

    SecuraError
    ├── ConfigError               a flag, key or value that is not allowed
    ├── BaseModelError            the base model cannot be found, read or served
    ├── DataError                 training data that cannot be used (file, line, field)
    ├── BasisFormatError          not a well-formed basis file (truncated, changed, unknown format)
    ├── TrainingError             a training that cannot go on
    ├── AdapterError              something about one adapter folder
    │   ├── AdapterFormatError    not a well-formed adapter (truncated, NaN, unknown format, pickle)
    │   ├── BaseMismatchError     well-formed, but trained on another base
    │   └── UnservableError       sound, but not in the way that was asked for
    ├── MergeError                a merge that cannot be planned, finished or confirmed
    ├── EvaluationError           an evaluation that cannot be started or finished
    ├── ServeError                a server that cannot start, or that ended on its own
    ├── FoldError                 a fold into the running engine that did not happen
    ├── LifecycleError            a change of a running server's adapters that did not happen
    ├── MixError                  a weighted mix of adapters that cannot be answered
    ├── PushError                 an update that a running server did not take
    ├── StorageError              a disk that is full or cannot be written
    └── IncompatibleVLLMError     a vLLM name that we build on has moved

A message says what was wrong, what was allowed and what to do. Errors that can find several
problems at once carry them all in ``problems``, so that one run shows everything to mend. A
ConfigError, and any other with ``wrong_use``, is the caller's: a command then ends with status 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = [
    "AdapterError",
    "AdapterFormatError",
    "BaseMismatchError",
    "BaseModelError",
    "BasisFormatError",
    "ConfigError",
    "DataError",
    "EvaluationError",
    "FoldError",
    "IncompatibleVLLMError",
    "LifecycleError",
    "MergeError",
    "MixError",
    "PushError",
    "SecuraError",
    "ServeError",
    "StorageError",
    "TrainingError",
    "UnservableError",
]


_SHOWN = 6


class SecuraError(Exception):
    """Root of the tree; ``problems`` lists each fault, the message the first few of them."""

    wrong_use = False
    """Whether it was asked for wrongly, as by naming a file that does not exist. What is there but
    damaged is none."""

    def __init__(
        self, message: str, problems: Sequence[str] = (), *, wrong_use: bool = False
    ) -> None:
        self.problems: tuple[str, ...] = tuple(problems) or (message,)
        self.wrong_use = wrong_use or self.wrong_use
        if problems:
            message += "".join(f"\n  - {p}" for p in problems[:_SHOWN])
            if len(problems) > _SHOWN:
                message += f"\n  - and {len(problems) - _SHOWN} more"
        super().__init__(message)


class ConfigError(SecuraError, ValueError):
    """A flag, a configuration key or a value that is not allowed."""

    wrong_use = True


class BaseModelError(SecuraError):
    """The base model cannot be found, read or served."""


class DataError(SecuraError, ValueError):
    """Training data that cannot be used; the message names file, line and field."""


class BasisFormatError(SecuraError, ValueError):
    """The file is not a well-formed basis file."""


class TrainingError(SecuraError):
    """A training that cannot go on; earlier checkpoints are kept."""


class AdapterError(SecuraError):
    """Something is wrong with one adapter folder."""


class AdapterFormatError(AdapterError, ValueError):
    """The folder is not a well-formed SECURA adapter."""


class BaseMismatchError(AdapterError, ValueError):
    """The adapter, or the basis file, is well-formed but belongs to another base model."""


class UnservableError(AdapterError):
    """The adapter is sound but cannot be used in the way that was asked for."""


class MergeError(SecuraError):
    """A merge that cannot be planned, finished or confirmed; nothing was left behind."""


class EvaluationError(SecuraError):
    """An evaluation that cannot be started or finished; no report was written."""


class ServeError(SecuraError):
    """A server that cannot start, or that ended on its own."""


class FoldError(SecuraError):
    """A fold into the running engine that did not happen; the message says what is served now."""


class _StatusError(SecuraError):
    """What a running server refuses to do.

    Args:
        status: the HTTP status that says it best.
    """

    def __init__(self, status: int, message: str) -> None:
        self.status = status
        super().__init__(message)

    def __reduce__(self) -> tuple[Any, ...]:
        """Be copied, and pass between processes, with the status that comes first."""
        return type(self), (self.status, str(self)), self.__dict__


class LifecycleError(_StatusError):
    """A change of a running server's adapters that did not happen; what was served still is."""


class MixError(_StatusError):
    """A weighted mix of adapters that a request asks for and that cannot be answered."""


class PushError(SecuraError):
    """An update that a running server did not take, or that did not reach it.

    Args:
        status: the HTTP status of the answer; None where no server answered.
        said: the server's own message.
    """

    def __init__(self, message: str, status: int | None = None, said: str = "") -> None:
        self.status, self.said = status, said
        super().__init__(message)


class StorageError(SecuraError):
    """A disk that is full or cannot be written; nothing was left behind."""


class IncompatibleVLLMError(SecuraError, RuntimeError):
    """A vLLM name that this package builds on is missing or has changed."""
