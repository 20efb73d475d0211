"""Console scripts, each of which imports only the room that it needs; that of ``secura-serve`` is
:mod:`secura_serve.serve.console`.
"""

from __future__ import annotations

import sys

from secura_serve.garbage import exit_without_collecting

__all__ = ["basis", "evaluate", "merge", "train"]


def basis() -> None:
    """Run ``secura-basis``."""
    from secura_serve.train.basis.main import main

    exit_without_collecting()
    sys.exit(main())


def evaluate() -> None:
    """Run ``secura-eval``."""
    from secura_serve.evaluate.main import main

    exit_without_collecting()
    sys.exit(main())


def merge() -> None:
    """Run ``secura-merge``."""
    from secura_serve.merge.main import main

    exit_without_collecting()
    sys.exit(main())


def train() -> None:
    """Run ``secura-train``."""
    from secura_serve.train.main import main

    exit_without_collecting()
    sys.exit(main())
