"""Names by which the server, vLLM's processes and its plugins find each other. Imports nothing."""

from __future__ import annotations

__all__ = ["ACTIVE", "CONFIG_KEY", "LOAD_FORMAT"]

LOAD_FORMAT = "secura"
"""Value of vLLM's ``--load-format`` that folds adapters while the weights load."""

ACTIVE = "SECURA_SERVE_ACTIVE"
"""Environment variable set by ``secura-serve`` and inherited by vLLM's workers. Without it, vLLM
stays as it is."""

CONFIG_KEY = "secura"
"""Under vLLM's ``additional_config``: ``{"basis": path, "base": folder, "plain_lora": bool,
"kernel": name}``."""
