"""``vllm.general_plugins`` entry point: runs in every process that vLLM starts."""

from __future__ import annotations

import os

__all__ = ["ACTIVE", "activate", "register"]

ACTIVE = "SECURA_SERVE_ACTIVE"
"""Set by ``secura-serve``, inherited by vLLM's workers. Without it, vLLM stays as it is."""


def register() -> None:
    """Install the adapter layers if this vLLM was started by us; safe to call again.

    Raises:
        IncompatibleVLLMError: a private vLLM name has moved.
    """
    if os.environ.get(ACTIVE) != "1":
        return
    from secura_serve.serve import compat

    compat.check()
    from secura_serve.serve.layers import CURLinearMixin
    from secura_serve.serve.manager import CURWorkerManager

    compat.install(CURLinearMixin, CURWorkerManager)


def activate() -> None:
    """Switch the plugin on for this process and those that it starts."""
    os.environ[ACTIVE] = "1"
    register()
