"""Console scripts. Each imports only the room that it needs."""

from __future__ import annotations

import sys

__all__ = ["evaluate", "merge", "serve", "train"]


def evaluate() -> None:
    """Run ``secura-eval``."""
    from secura_serve.evaluate.main import main

    sys.exit(main())


def merge() -> None:
    """Run ``secura-merge``."""
    from secura_serve.merge.main import main

    sys.exit(main())


def serve() -> None:
    """Run ``secura-serve``."""
    from secura_serve.serve.app.main import main

    sys.exit(main())


def train() -> None:
    """Run ``secura-train``."""
    from secura_serve.train.main import main

    sys.exit(main())
