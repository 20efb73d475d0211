"""``vllm.general_plugins`` entry point: runs in every process that vLLM starts."""

from __future__ import annotations

import multiprocessing
import os
from importlib.metadata import entry_points

from secura_serve.errors import ConfigError
from secura_serve.serve.names import ACTIVE

__all__ = ["activate", "choose_plugins", "register"]

_GROUP, _ADMIN = "vllm.endpoint_plugins", "secura_admin"


def register() -> None:
    """Make ``--load-format secura`` known; if this vLLM was started by us, have its processes end
    with the server, and install the adapter layers. Safe to call again.

    Raises:
        IncompatibleVLLMError: a private vLLM name has moved.
    """
    from secura_serve.serve.children import prepare
    from secura_serve.serve.loader import register_loader
    from secura_serve.system.garbage_collection import collect_as_usual

    if multiprocessing.parent_process() is not None:
        # All that is large has been imported by now.
        collect_as_usual()

    register_loader()
    prepare()
    if os.environ.get(ACTIVE) != "1":
        return
    from secura_serve.serve import compat

    compat.check()
    from secura_serve.serve.engine.layers import CURLinearMixin
    from secura_serve.serve.engine.manager import CURWorkerManager

    compat.install(CURLinearMixin, CURWorkerManager)


def activate() -> None:
    """Switch the plugin on for this process and those that it starts."""
    os.environ[ACTIVE] = "1"
    register()


def choose_plugins() -> None:
    """Have vLLM load our endpoint plugin, and leave its other plugins as they would be.

    It loads endpoint plugins only where ``VLLM_PLUGINS`` names them, and setting that variable
    makes it a list of all plugins allowed, of every kind.

    Raises:
        ConfigError: this installation does not have the plugin.
    """
    if not any(p.name == _ADMIN for p in entry_points(group=_GROUP)):
        raise ConfigError(
            "this installation of secura-serve has no entry point for its admin routes; install "
            "it again (make setup, or pip install -e .)"
        )
    wanted = os.environ.get("VLLM_PLUGINS")
    if wanted is None:
        groups = [g for g in entry_points().groups if g.startswith("vllm.")]
        groups.remove(_GROUP)
        names = [plugin.name for g in sorted(groups) for plugin in entry_points(group=g)]
    else:
        names = [name for name in wanted.split(",") if name]
    os.environ["VLLM_PLUGINS"] = ",".join(dict.fromkeys([*names, "secura", _ADMIN]))
