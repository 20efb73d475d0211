"""Console scripts, each of which imports only the room that it needs; that of ``secura-serve`` is
:mod:`secura_serve.serve.console`.
"""

from __future__ import annotations

import sys

from secura_serve.system.garbage_collection import exit_without_collecting

__all__ = ["basis", "demo", "evaluate", "merge", "train"]


def basis() -> None:
    """Run ``secura-basis``."""
    from secura_serve.train.basis.main import main

    exit_without_collecting()
    sys.exit(main())


def demo() -> None:
    """Run ``secura-demo``."""
    from importlib import import_module

    from secura_serve.page_module import page_module

    module = page_module()
    if module is None:
        sys.exit("secura-demo: error: the page is not part of this installation; reinstall it")
    try:
        sys.exit(import_module(module).main())
    except ModuleNotFoundError as error:
        if error.name not in ("gradio", "httpx", "openai", "prometheus_client"):
            raise
        sys.exit(f"secura-demo: error: it needs {error.name}: pip install 'secura-serve[demo]'")


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
