"""What an error says to a user: why reading or writing failed, and whether the path was wrong."""

from __future__ import annotations

__all__ = ["described", "is_wrong_path", "reason"]

_WRONG = (
    *(FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError),
    PermissionError,
)


def reason(error: BaseException) -> str:
    """Return the system's reason without number and path, ``No such file or directory``.

    Of an error that is not the system's: its text.
    """
    if isinstance(error, KeyError):
        return f"{error.args[0]} is missing"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def described(error: BaseException) -> str:
    """Return the reason, and the file where there is one: ``No space left on device: /tmp/x``."""
    file = getattr(error, "filename", None)
    return f"{reason(error)}: {file}" if file else reason(error)


def is_wrong_path(error: BaseException) -> bool:
    """Return whether the path cannot be right: missing, forbidden, or a folder for a file.

    A full or failing disk is a run that failed.
    """
    return isinstance(error, _WRONG)
