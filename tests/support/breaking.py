"""``secura-serve`` whose workers fail when a test says so, each by itself.

A launcher that takes the command's place: vLLM's processes import the file that the first one
runs, and so have :func:`install` run, too.
"""

from __future__ import annotations

from pathlib import Path

_LAUNCHER = """
import sys

if __name__ == "__main__":
    from secura_serve.serve.console import main

    sys.exit(main())
from tests.support.breaking import install

install({folder!r})
"""


class Breaking:
    """Says which worker fails, in a folder that the workers look into.

    Attributes:
        launcher: what to run instead of ``secura-serve``, with vLLM's processes spawned.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder, self.launcher = folder, folder / "launcher.py"
        self.launcher.write_text(_LAUNCHER.format(folder=str(folder)))

    def next(self, what: str, engine: int, rank: int) -> None:
        """Have one worker fail the next time that it comes to ``what``: ``read`` an adapter, tell
        its ``slots``, ``put`` an adapter into one, ``fill`` a place or ``fold``."""
        (self.folder / f"{what}-{engine}-{rank}").touch()


def install(folder: str) -> None:
    """Make this worker one that fails."""
    import torch

    from secura_serve.serve import compat
    from secura_serve.serve.engine import worker_extension
    from secura_serve.serve.engine.deltas import ResidentDeltas
    from secura_serve.serve.engine.manager import CURWorkerManager

    begin, engines = CURWorkerManager.__init__, []

    def start(self, vllm_config, *args, **kwargs):
        engines.append(vllm_config.parallel_config.data_parallel_index)
        begin(self, vllm_config, *args, **kwargs)

    def breakable(what, do):
        def done(*args, **kwargs):
            here = f"{engines[-1]}-{torch.distributed.get_rank()}"
            file = Path(folder, f"{what}-{here}")
            if file.exists():
                file.unlink()
                # A type that nobody turns into a refusal.
                raise LookupError(f"worker {here} cannot: {what}")
            return do(*args, **kwargs)

        return done

    CURWorkerManager.__init__ = start
    CURWorkerManager.keep = breakable("read", CURWorkerManager.keep)
    CURWorkerManager.add_adapter = breakable("put", CURWorkerManager.add_adapter)
    compat.resident = breakable("slots", compat.resident)
    ResidentDeltas.fill = breakable("fill", ResidentDeltas.fill)
    worker_extension.open_source = breakable("fold", worker_extension.open_source)
