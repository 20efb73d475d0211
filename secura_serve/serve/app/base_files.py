"""Whether the base's files are still those that the server started with."""

from __future__ import annotations

from pathlib import Path

__all__ = ["BaseFiles"]


class BaseFiles:
    """The files with weights in the base's folder, as they are when this is made.

    Weights are made from them whenever they change, those of the base itself included. Compared by
    inode, size and time of writing: a link or a change of rights alters no weight.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._at_first = self._look()

    def changed(self) -> str | None:
        """Return the name of a file that was added, replaced, written or removed, if any."""
        now = self._look()
        names = {*now, *self._at_first}
        return min((n for n in names if now.get(n) != self._at_first.get(n)), default=None)

    def _look(self) -> dict[str, tuple[int, int, int] | None]:
        return {file.name: _facts(file) for file in self.folder.glob("*.safetensors")}


def _facts(file: Path) -> tuple[int, int, int] | None:
    try:
        stat = file.stat()
    except OSError:
        # A link whose target is gone is listed all the same.
        return None
    return stat.st_ino, stat.st_size, stat.st_mtime_ns
