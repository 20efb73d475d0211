"""Console scripts: parse, configure, one call. Each imports only the room that it needs."""

from __future__ import annotations

import sys

__all__ = ["evaluate", "merge", "serve", "train"]


def evaluate() -> None:
    """``secura-eval``."""
    from secura_serve.evaluate.main import main

    sys.exit(main())


def merge() -> None:
    """``secura-merge``."""
    from secura_serve.merge.main import main

    sys.exit(main())


def serve() -> None:
    """``secura-serve``."""
    from secura_serve.serve.app.main import main

    sys.exit(main())


def train() -> None:
    """``secura-train``."""
    from secura_serve.train.main import main

    sys.exit(main())
