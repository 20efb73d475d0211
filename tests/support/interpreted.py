"""Runs tests of Triton kernels in a process of their own: interpreted on the CPU, or compiled.

The interpreter has to be chosen before Triton is imported.
"""

from __future__ import annotations

import os
import subprocess
import sys

from tests.support import ROOT


def run(code, *, interpreted):
    """Raise CalledProcessError unless the code runs to its end."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    if interpreted:
        env["TRITON_INTERPRET"] = "1"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env=env)
